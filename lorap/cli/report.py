"""``lorap report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorap.cli.common import AsJson, Debug, user_errors
from lorap.errors import CheckpointError
from lorap.jsonio import read_json
from lorap.reports.html.page import write_page
from lorap.reports.run import REPORT, CompressionReport


def report_command(
    folder: Annotated[Path, typer.Argument(help="A folder that `lorap compress` has written.", metavar="OUT")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write OUT/report.html anew from OUT/lorap_report.json: what the compression did, with charts, for a browser.

    `lorap compress` leaves the same page; this is for folders from before, and after an update of lorap. The page is one file
    that loads nothing, so it can be mailed. Nothing else in OUT is touched.

    \b
    Example:
      lorap report ./small
    """
    with user_errors(debug, as_json) as answer:
        path = folder / REPORT
        if not folder.is_dir():
            raise CheckpointError(
                f"there is no folder {folder}; give one that `lorap compress` or `lorap recover` has written"
            )
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {REPORT}; give a folder that `lorap compress` has written")
        values = read_json(path)
        try:
            report = CompressionReport.from_dict(values)
        except CheckpointError as error:
            raise CheckpointError(f"cannot use {path}: {error}") from error
        try:
            page = write_page(report, folder)
        except OSError as error:
            raise CheckpointError(f"cannot write into {folder}: {error.strerror}") from error
        typer.echo(f"written to {page}")
        answer({"page": str(page), "bytes": page.stat().st_size})
