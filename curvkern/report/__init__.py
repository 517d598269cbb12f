"""What a restoration did and what was measured: as a table, as JSON, as one HTML page."""

from curvkern.report.page import render_page, write_page
from curvkern.report.record import ModuleChange, Report, Stage, Stages, record_change
from curvkern.report.statistics import render_statistics
from curvkern.report.table import print_report

__all__ = [
    "ModuleChange",
    "Report",
    "Stage",
    "Stages",
    "print_report",
    "record_change",
    "render_page",
    "render_statistics",
    "write_page",
]
