"""Flows from noise to data, with SiT's API and semantics, and MeanFlow.

Time runs from 0, noise, to 1, data. A model is any callable ``model(x, t, **model_kwargs)``.
"""

from ditfast.flow.meanflow import MeanFlow
from ditfast.flow.sampler import Sampler
from ditfast.flow.transport import Transport, create_transport

__all__ = ["MeanFlow", "Sampler", "Transport", "create_transport"]
