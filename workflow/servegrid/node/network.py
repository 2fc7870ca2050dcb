"""How this machine reaches a server: trusted certificates, and proxies of the environment."""

from __future__ import annotations

import base64
import ipaddress
import ssl
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from servegrid.errors import ConfigError


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy. `authorization` is the value of Proxy-Authorization, if it needs one."""

    host: str
    port: int
    authorization: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers that the proxy needs."""
        return {} if self.authorization is None else {"Proxy-Authorization": self.authorization}

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def find_proxy(url: str) -> Proxy | None:
    """The proxy for `url` by `https_proxy`, `http_proxy`, `all_proxy` and `no_proxy`.

    None for this machine itself. Raises ConfigError if the proxy is not an HTTP proxy.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if not host or _is_this_machine(host) or proxy_bypass(host):
        return None
    proxies = getproxies_environment()
    chosen = proxies.get(parts.scheme) or proxies.get("all")
    if not chosen:
        return None
    try:
        found = urlsplit(chosen if "://" in chosen else f"http://{chosen}")
        scheme, name, port = found.scheme, found.hostname, found.port or 80
    except ValueError:
        scheme, name, port = "", None, 0
    if scheme != "http" or not name:
        raise ConfigError(
            f"The proxy for {parts.scheme} in the environment is not http://HOST:PORT. Correct "
            f"`{parts.scheme}_proxy`, or name {host} in `no_proxy`."
        )
    authorization = None
    if found.username is not None:
        pair = f"{unquote(found.username)}:{unquote(found.password or '')}"
        authorization = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return Proxy(name, port, authorization)


def tls_context(ca_file: str | None, verify: bool) -> ssl.SSLContext:
    """The TLS settings of a client.

    It trusts the certificates of this system, or those in SSL_CERT_FILE, and those in `ca_file`.
    Without `verify` it trusts every server. Raises ConfigError if `ca_file` has no certificates.
    """
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"ca_file {ca_file}: no certificates can be read from it "
                f"({getattr(error, 'strerror', None) or error}). Name a PEM file."
            ) from error
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
