"""Pictures of results: functions that take data and a path. Pictures need matplotlib."""

from qkern.plotting.heat import check_picture, plot_heat
from qkern.plotting.style import has_matplotlib

__all__ = ["check_picture", "has_matplotlib", "plot_heat"]
