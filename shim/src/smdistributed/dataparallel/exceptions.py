"""The errors a job may end with. SageMaker's training toolkit looks for their names in what a failing rank printed, and
reports the failure by that name: that is why the module exists, and why it has nothing but errors in it."""

from smdistributed_rs.errors import *  # noqa: F403
