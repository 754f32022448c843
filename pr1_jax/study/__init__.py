"""The paper's claims in miniature: cells, runs, intervals, verdicts, figures."""
