"""Budgets and predictions for gateways in front of engines. Each module needs the gateway that it is named after."""
