"""GGUF files of llama.cpp: written for it, and read as transformers models; headers alone are read without torch."""
