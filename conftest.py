"""For all tests: hypothesis without a deadline, because a busy machine is not a bug."""

import hypothesis

hypothesis.settings.register_profile("soundstage", deadline=None)
hypothesis.settings.load_profile("soundstage")
