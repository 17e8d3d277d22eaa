"""Azure LLM Inference Trace 2023: when requests to a language model came (Patel et al., "Splitwise", ISCA 2024;
Azure/AzurePublicDataset, ``AzureLLMInferenceTrace_{code,conv}.csv``).

Columns ``TIMESTAMP, ContextTokens, GeneratedTokens``, rows in order of arrival. There is one model: the trace lends
its extreme bursts, the functions are drawn from a popularity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from hotset.simulation.traces.reading import Table, Timestamps
from hotset.simulation.traces.trace import InvocationTrace
from hotset.simulation.workloads import Arrival


class AzureLLM(InvocationTrace):
    """Arrivals only: every function name is empty."""

    format: ClassVar[str] = "azure_llm"
    columns: ClassVar[tuple[str, ...]] = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    names_functions: ClassVar[bool] = False

    def rows(self) -> Iterator[Arrival]:
        """The requests, in seconds after the file's first (the trace's 100 ns steps are cut to microseconds)."""
        table = Table(self.path, self.columns)
        clock = Timestamps(table, "TIMESTAMP")
        for timestamp, context_tokens, generated_tokens in table.rows(self.columns):
            table.number(context_tokens, "ContextTokens")
            table.number(generated_tokens, "GeneratedTokens")
            yield Arrival(clock.seconds(timestamp), "")
