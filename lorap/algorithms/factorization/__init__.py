"""Weighted low-rank factorization: the best rank-r stand-in for a weight, with a proof of how close to the best it is.

``problem``      a weight between its metrics becomes an eigenproblem of its smaller side, and its answer a factor pair.
``eigen``        three methods for the top of a spectrum; ``certificate`` proves how good an answer is.
``solvers``      which method, and which one takes over.
``tasks``        what goes together, memory, uploads.
``batch``        all of it: ``factorize`` and ``factorize_batch``.
"""

from lorap.algorithms.factorization.batch import Factorization, factorize, factorize_batch
from lorap.algorithms.factorization.problem import root_of, spectrum, suffix_sums

__all__ = ["Factorization", "factorize", "factorize_batch", "root_of", "spectrum", "suffix_sums"]
