"""A server that plays a script and says when it did what: what the load client is checked against.

    python -m servegrid.mock_server '{"ttft_s": 0.1, "itl_s": 0.02}'

It prints its port (an empty line where it listens on a Unix socket) and serves OpenAI's
completions until its standard input is closed. `/log` tells when each request had been read and
when each piece of its answer was sent. Its process imports the standard library only, and makes
answers before they are due: on a small machine it shares the cores with the client that it judges.

`script` says what is answered, `loop` answers, `process` has the server in a process of its own.
"""
