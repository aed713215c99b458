"""Budgets of clients: reserve what a request may need before it runs, settle what it took, refund the rest.

A gateway that limits tokens by the minute knows a request's length only at its end. Here it reserves the prompt and a
quantile of the predicted answer, so that what runs is counted from its first moment on, and no more is held back than
the chosen risk asks for. Knows amounts, windows and books; nothing of HTTP, and no predictor.
"""

from mope.budgets.books import Books, Decision, Settlement, Totals, open_books
from mope.budgets.config import Budget, Budgets, read_budgets

__all__ = ["Books", "Budget", "Budgets", "Decision", "Settlement", "Totals", "open_books", "read_budgets"]
