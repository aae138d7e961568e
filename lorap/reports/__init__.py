"""What a run reports: records, tables, pictures, the model card, pages."""
