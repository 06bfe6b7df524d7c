"""For all tests: nothing that a busy machine makes slow or red.

Hypothesis has no deadline, and logs have no tracebacks by rich, which take seconds to draw all locals.
"""

import os

import hypothesis
import structlog

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # as the command line does: tests start processes too
hypothesis.settings.register_profile("soundstage", deadline=None)
hypothesis.settings.load_profile("soundstage")
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)
