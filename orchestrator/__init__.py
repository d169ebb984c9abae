"""Decides and drives: configuration, plan, ledger, driver, runners, report."""
