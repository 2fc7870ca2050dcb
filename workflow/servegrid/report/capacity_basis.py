"""What the capacity plan rests on: what is measured, recorded, assumed and modelled. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from servegrid.analysis.capacity import Demand, HardwarePrices
from servegrid.study.recorded_users import BREAK_S, INTERVAL_S, RecordedUsers
from servegrid.study.text import pluralize

MEASURED = "Measured"
ASSUMED = "Assumed"
MODELLED = "Modelled"
_HOUR_S, _DAY_S = 3600.0, 86_400.0


def describe_basis(demand: Demand, hardware: HardwarePrices) -> Mapping[str, Sequence[str]]:
    """Sentences under the titles MEASURED, the recorded users if there are any, ASSUMED, MODELLED.

    `Measured` is what the cells of the study, or of the published data, say.
    """
    recorded = demand.recorded
    basis: dict[str, Sequence[str]] = {
        MEASURED: (
            "Times of a request, per prompt length, output length and number of requests in "
            "flight: medians of the cells, with their intervals.",
            "The energy per output token, if the hardware reports it.",
        )
    }
    if recorded is not None:
        basis[f"From the {recorded.label}"] = tuple(_recorded(recorded))
    basis[ASSUMED] = tuple(_assumed(demand, hardware))
    basis[MODELLED] = tuple(_modelled(demand))
    return basis


def _recorded(users: RecordedUsers) -> list[str]:
    left_out = f"; {pluralize(users.left_out, 'row')} left out" if users.left_out else ""
    within = f" within {_duration(users.span_s)}" if users.span_s else ""
    outputs = (
        "The file does not say how long outputs are: those of each measured workload count."
        if users.output_len is None
        else f"Outputs: {users.output_len:,.0f} tokens on average."
    )
    texts = [
        f"{pluralize(users.requests, 'request')}{within}{left_out}.",
        f"Prompts: {users.input_len:,.0f} tokens on average, at most {users.input_lens[-1][0]:,}.",
        outputs,
    ]
    rate = users.busiest_requests_per_s
    if rate is None:
        return [*texts, "It has no times, so it says nothing about rates and think times."]
    texts += [
        f"Busiest {_duration(users.window_s)}: {rate:.3g} requests/s "
        f"({pluralize(users.window_requests, 'request')}), with "
        f"{users.window_input_len or 0:,.0f} prompt and {users.window_output_len or 0:,.0f} "
        "output tokens on average. The plan is for this rate.",
        _peak(users),
    ]
    if users.dispersion is not None:
        texts.append(
            f"Variance / mean of the requests per {INTERVAL_S:g} s, within "
            f"{_duration(users.window_s)}: {users.dispersion:.3g} (1 for a Poisson process; more "
            "for bursts)."
        )
    return [*texts, *_sessions(users)]


def _peak(users: RecordedUsers) -> str:
    mean = f"Mean rate: {users.requests / users.span_s:.3g} requests/s"
    if users.load_factor is None:
        return f"{mean}. It has less than a day, so it does not say what the load factor is."
    return f"{mean}, a load factor of {users.load_factor:.3g}."


def _sessions(users: RecordedUsers) -> list[str]:
    if users.cycle_s is None:
        return ["It has no sessions, or too few requests in them, so no users and think times."]
    texts = [
        f"{pluralize(users.sessions or 0, 'session')} with requests in the busiest window.",
        f"From a request to the next one of the session: {users.cycle_s:,.3g} s on average. "
        f"{100 * (users.followed or 0):.3g}% of the requests have a next one within "
        f"{BREAK_S / 60:g} minutes.",
    ]
    if users.think_time_s is not None:
        texts.append(
            f"Think time, without the recorded response times: {users.think_time_s:,.3g} s."
        )
    return texts


def _assumed(demand: Demand, hardware: HardwarePrices) -> list[str]:
    recorded = demand.recorded
    texts = []
    if demand.requests_per_s is None:
        texts.append(
            f"{pluralize(demand.users, 'registered user')}. At the busiest time, a share of "
            f"{demand.logged_in:.4g} is logged in ({pluralize(demand.concurrent_users, 'user')})."
        )
    if recorded is None or recorded.cycle_s is None:
        texts.append(
            f"On average, {demand.think_time_s:g} s pass between a response and the next request "
            "of the same user."
        )
    if recorded is None or recorded.load_factor is None:
        texts.append(
            f"The mean load of a week is {demand.load_factor:g} of that at the busiest time."
        )
    if demand.recorded_lengths is None:
        texts.append(_prompts(demand))
    if demand.requests_per_s is not None and recorded and recorded.dispersion is None:
        texts.append("Requests arrive like a Poisson process: the trace is too short to say.")
    if recorded is not None:
        texts.append(
            f"A token of the {recorded.kind} is a token of each model. The users to plan for are "
            "like those recorded."
        )
    limits = [
        f"{name} at most {limit:g} s (median)"
        for name, limit in (
            ("the time to first token is", demand.ttft_s),
            ("the end-to-end latency is", demand.e2el_s),
            ("the time per output token is", demand.tpot_s),
            ("the longest inter-token latency of a request is", demand.itl_s),
        )
        if limit is not None
    ]
    return [
        *texts,
        f"{100 * demand.slo_attainment:g}% of requests must get at least "
        f"{demand.tokens_per_s_per_user:g} output tokens/s, including the time to first token"
        f"{''.join(f', and {limit}' for limit in limits)}.",
        f"Prices are for GPUs only, in {hardware.currency}.",
    ]


def _prompts(demand: Demand) -> str:
    if demand.input_len is not None:
        return f"Prompts have about {demand.input_len} tokens."
    if demand.prompt_mix is None:
        return "All measured prompt lengths have equal shares."
    total = sum(demand.prompt_mix.values())
    parts = [f"{share / total:.3g} of {length}" for length, share in demand.prompt_mix.items()]
    if len(parts) == 1:
        return f"Prompts have about {next(iter(demand.prompt_mix))} tokens."
    return f"Prompts have several lengths: {', '.join(parts)} tokens."


def _modelled(demand: Demand) -> list[str]:
    texts = ["Times between two measured numbers of requests in flight are interpolated linearly."]
    recorded = demand.recorded
    if demand.requests_per_s is None:
        texts.append(
            "How many requests are in flight: users act independently of each other "
            "(finite-population queue)."
        )
    else:
        texts += [
            "How many requests are in flight: requests arrive at the rate of the busiest window "
            "and go to a random replica. They are as bursty as recorded: a Poisson process of "
            "groups, whose size is the variance / mean (Hayward's approximation).",
            "Response times, and from them the numbers of users: requests/s × (think time + "
            "response time), Little's law."
            + (
                " The think time is the recorded time between two requests minus the modelled "
                "response time."
                if demand.cycle_s is not None
                else ""
            ),
        ]
    if demand.recorded_lengths is not None:
        texts.append(
            "A prompt length between two measured ones counts partly as each of them, so that the "
            "mean stays the same. A prompt shorter than the shortest measured length counts "
            "as that length. A longer prompt than the longest measured one loads the server like "
            "that one and counts as if it missed the SLO; the table has the share of such requests."
        )
    if recorded is not None and recorded.output_len is not None:
        texts.append(
            f"Outputs of {recorded.output_len:,.0f} tokens take longer than those of a measured "
            "workload with shorter outputs, in proportion to the tokens. In a workload with longer "
            "outputs, a request counts as one that was measured. If the lengths differ by more "
            "than a factor of 1.5, there is no plan."
        )
    return texts


def _duration(seconds: float) -> str:
    """`90 s`, `5 minutes`, `3.5 hours` or `8 days`.

    >>> [_duration(each) for each in (90, 300, 3_600, 12_600, 691_200)]
    ['90 s', '5 minutes', '60 minutes', '3.5 hours', '8 days']
    """
    if seconds < 300:
        return f"{seconds:.3g} s"
    if seconds < 2 * _HOUR_S:
        return f"{seconds / 60:.3g} minutes"
    if seconds < 2 * _DAY_S:
        return f"{seconds / _HOUR_S:.3g} hours"
    return f"{seconds / _DAY_S:.3g} days"
