"""Pictures and Markdown of results: functions that take data and a path. Pictures need matplotlib."""

from qkern.plotting.charts import plot_bars, plot_points
from qkern.plotting.heat import check_picture, plot_heat
from qkern.plotting.style import has_matplotlib
from qkern.plotting.tables import Table, markdown

__all__ = [
    "Table",
    "check_picture",
    "has_matplotlib",
    "markdown",
    "plot_bars",
    "plot_heat",
    "plot_points",
]
