"""Which page a folder gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedloom.reports.comparison_page import write_comparison
from fedloom.reports.evaluation_page import is_evaluation, write_evaluation
from fedloom.reports.run_page import write_report
from fedloom.storage.run_folder import is_comparison


def write_page_of(
    folders: Sequence[Path], target: Path | None, warn: Callable[[str], None]
) -> Path:
    """Write the page of runs, or of one comparison or evaluation.

    Args:
        folders: Run folders, or the folder of one comparison or evaluation.
        target: File to write (default: report.html in the folder).
        warn: Told why the page's figures are doubted, if they are.

    Raises:
        OutputError: A folder is none of these, or the page cannot be written.
    """
    if len(folders) == 1:
        (folder,) = folders
        if is_comparison(folder):
            return write_comparison(folder, target, warn)
        if is_evaluation(folder):
            return write_evaluation(folder, target)
    return write_report(folders, target, warn)
