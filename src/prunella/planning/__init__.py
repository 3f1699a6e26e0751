"""From a request to a plan: candidates, budgets and the accounting of what a plan gives."""
