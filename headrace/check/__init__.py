"""Named cases, error budgets and fakes shared by tests and benchmarks."""
