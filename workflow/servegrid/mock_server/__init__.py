"""A mock OpenAI-compatible server with known response times, to check the load client.

    python -m servegrid.mock_server '{"ttft_s": 0.1, "itl_s": 0.02}'

It prints its port (an empty line for a Unix socket) and serves OpenAI's completions until its
standard input is closed. `/log` returns when it read each request and when it sent each piece of
the response. It imports only the standard library and prepares responses before they are due: on a
small machine it shares the cores with the client under test.

`responses` builds the responses, `server` sends them, `process` runs the server as a subprocess.
"""
