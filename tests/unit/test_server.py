"""What a server's /metrics page becomes."""

from servegrid.server import parsed

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# HELP vllm:time_to_first_token_seconds Histogram of time to first token.
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.1"} 1.0
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 2.0
vllm:time_to_first_token_seconds_count 2.0
vllm:time_to_first_token_seconds_sum 0.25
# HELP vllm:prefix_cache_hits_total Prefix cache hits.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total 0.0
vllm:prefix_cache_hits_created 1.7e+09
# HELP process_open_fds Number of open file descriptors.
# TYPE process_open_fds gauge
process_open_fds 41.0
"""


def test_engine_samples_are_added_over_labels_without_buckets() -> None:
    assert parsed(PAGE) == {
        "vllm:num_requests_running": 7.0,
        "vllm:time_to_first_token_seconds_count": 2.0,
        "vllm:time_to_first_token_seconds_sum": 0.25,
        "vllm:prefix_cache_hits_total": 0.0,
    }
