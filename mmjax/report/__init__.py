"""The page that shows runs: `python -m mmjax.evaluate --workdir=RUN --report`."""

from mmjax.report.page import page, write
from mmjax.report.read import read_runs

__all__ = ["page", "read_runs", "write"]
