"""`soundstage`: the command line."""

import os

# Before gRPC is imported. It would prepare itself for children that go on with its channels; ours become other
# programs, and where its threads are at work at that moment a child dies of it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
