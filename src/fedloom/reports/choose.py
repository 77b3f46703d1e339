"""Which page a folder gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedloom.display.untrusted_text import short
from fedloom.errors import OutputError, first_line
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
        OutputError: A folder is none of these, a record in it is not what a run wrote, or the page cannot
            be written.
    """
    try:
        return _written(folders, target, warn)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise _damaged(folders, error) from error
    except Exception as error:
        from jinja2 import TemplateError  # takes a tenth of a second

        if not isinstance(error, TemplateError):
            raise
        raise _damaged(folders, error) from error


def _damaged(folders: Sequence[Path], error: Exception) -> OutputError:
    """Return what to say of records that no page can be made of: they come from anywhere."""
    return OutputError(
        f"{', '.join(map(str, folders))}: a record there is not what a run wrote "
        f"({type(error).__name__}: {short(first_line(error), 100)}); put its files back from a backup, "
        "and if nobody has changed them, report this as a fault of fedloom"
    )


def _written(folders: Sequence[Path], target: Path | None, warn: Callable[[str], None]) -> Path:
    if len(folders) == 1:
        (folder,) = folders
        if is_comparison(folder):
            return write_comparison(folder, target, warn)
        if is_evaluation(folder):
            return write_evaluation(folder, target)
    return write_report(folders, target, warn)
