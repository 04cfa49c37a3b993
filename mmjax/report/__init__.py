"""The page that shows runs: `python -m mmjax.evaluate --workdir=RUN --report`."""

from mmjax.report.page import page, write

__all__ = ["page", "write"]
