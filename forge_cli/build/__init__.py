"""One section of the plan becomes one live object."""
