"""Keeps the requests of a text in step: they enter the engine together, are never put aside, and leave together."""

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from soundstage_lm.vllm_engine.ticket import from_extra_args


class PairScheduler(Scheduler):
    """vLLM's scheduler behind a door that opens for whole texts only.

    A text comes in when all its prompts fit the step, and when the pages it can ever need are free beside those that
    the texts inside can ever need. So prompts are read in one step, and nothing is evicted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.policy != SchedulingPolicy.FCFS or self.connector is not None or self.num_spec_tokens:
            raise ValueError("texts are kept in step only first come first served, without connectors or drafts")
        self._held: dict[str, list[Request]] = {}  # by text, in order of arrival
        self._partners: dict[str, str] = {}

    def add_request(self, request: Request) -> None:
        """Hold a request until its text is whole and may come in."""
        self._held.setdefault(_ticket(request).text, []).append(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Let in what fits, then schedule."""
        self._let_in()
        return super().schedule(*args, **kwargs)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """End requests and their partners, held ones too."""
        if request_ids is None:
            self._held.clear()
            return super().finish_requests(None, finished_status)
        ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        ids |= {self._partners[name] for name in ids if name in self._partners}
        self._held = {
            text: members
            for text, members in self._held.items()
            if ids.isdisjoint(member.request_id for member in members)
        }
        return super().finish_requests(ids, finished_status)

    def get_num_unfinished_requests(self) -> int:
        """Count whole texts that are held, so that the engine does not sleep on them."""
        return super().get_num_unfinished_requests() + sum(map(len, self._whole().values()))

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._partners.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _whole(self) -> dict[str, list[Request]]:
        return {
            text: members for text, members in self._held.items() if len(members) == _ticket(members[0]).num_members
        }

    def _let_in(self) -> None:
        inside = [*self.running, *self.waiting]
        pages = self.kv_cache_manager.block_pool.num_gpu_blocks - 1 - sum(map(self._pages, inside))
        tokens = self.max_num_scheduled_tokens - sum(
            max(1, request.num_tokens - request.num_computed_tokens) for request in inside
        )
        slots = self.max_num_running_reqs - len(inside)
        for text, members in self._whole().items():
            pages -= sum(map(self._pages, members))
            tokens -= sum(member.num_tokens for member in members)
            slots -= len(members)
            if min(pages, tokens, slots) < 0:
                break  # whoever comes later waits behind it
            del self._held[text]
            for member in members:
                super().add_request(member)
            if len(members) > 1:
                first, second = (member.request_id for member in members)
                self._partners |= {first: second, second: first}

    def _pages(self, request: Request) -> int:
        """Count the pages a request can ever need."""
        return -(-(request.num_prompt_tokens + request.max_tokens) // self.block_size)


def _ticket(request: Request) -> Any:
    assert request.sampling_params is not None
    return from_extra_args(request.sampling_params.extra_args)
