"""The email tool: plain text, through an SMTP server or as files in a folder."""

import hashlib
import os
import re
import smtplib
import ssl
import threading
from contextlib import suppress
from email.message import EmailMessage
from email.utils import formatdate, getaddresses, make_msgid
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .base import Result, ToolError, ToolUnavailable, require_text

SMTP_SECONDS = 10.0  # for each step of the conversation
ADDRESS = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[A-Za-z0-9.-]{1,190}", re.ASCII)
LINE_BREAK = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # and all other control characters


class EmailSender:
    """Send plain-text email: through the SMTP server in smtp_url, or, without one, as files in `outbox`."""

    def __init__(self, outbox: Path, smtp_url: str | None) -> None:
        self.outbox = outbox
        self.smtp_url = smtp_url

    def send(self, to: str, subject: str, body: str, *, idempotency_key: str | None = None) -> Result:
        """Send an email; `to` may be several addresses with commas between them.

        A second call with the same idempotency_key sends nothing and says "already_sent".
        The file in the outbox is the memory of what was sent. Over SMTP, a crash between the server's yes and the
        writing of that file sends twice, with the same Message-ID: the recipient's server may notice.
        """
        message = compose(to, subject, body, idempotency_key)
        number = str(message["Message-ID"])
        path = self.outbox / f"{number.strip('<>').removesuffix('@task-streams')}.eml"
        result = {"to": str(message["To"]), "subject": subject, "message_id": number, "file": str(path)}
        if idempotency_key and path.exists():
            return {**result, "already_sent": True}
        if not self.smtp_url:
            write_whole(path, bytes(message))
            return result
        refused = send_by_smtp(message, self.smtp_url)
        with suppress(ToolUnavailable):  # it is sent: failing now would send it once more
            write_whole(path, bytes(message))
        return {**result, "refused": refused} if refused else result


def compose(to: str, subject: str, body: str, message_id: str | None) -> EmailMessage:
    """Return the message. Raises ToolError for anything that could become a header of its own or isn't an address."""
    require_text(to=to, subject=subject, body=body, message_id="" if message_id is None else message_id)
    if LINE_BREAK.search(to + subject):
        raise ToolError("a line break or control character in to or subject; remove it")
    addresses = [address for _, address in getaddresses([to])]
    for address in addresses or [to]:
        if not ADDRESS.fullmatch(address):
            raise ToolError(f"not an email address: {address or to!r:.200}; expected name@example.org")
    message = EmailMessage()
    try:
        message["From"] = os.environ.get("MAIL_FROM", "agent@localhost")
        message["To"] = ", ".join(addresses)
        message["Subject"] = subject
        message["Date"] = formatdate(localtime=True)
        known = f"<{safe_name(message_id)}@task-streams>" if message_id else None
        message["Message-ID"] = known or make_msgid(domain="task-streams")
        message.set_content(body)
        bytes(message)  # a text that can't be written shows now
    except ValueError as error:  # a line break in MAIL_FROM, half a surrogate pair in a text
        raise ToolError(f"cannot be written as an email: {error}") from error
    return message


def safe_name(text: str) -> str:
    """Return a file name for any text, different for different texts. "task/1" -> "task_1-e4f0a1c2" """
    name = re.sub(r"[^A-Za-z0-9.-]", "_", text)[:100]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise ToolUnavailable(f"cannot write {path}: {error.strerror}; is the disk full?") from error


def send_by_smtp(message: EmailMessage, url: str) -> list[str]:
    """Hand a message to smtp://user:password@host:port?starttls=1 or smtps://…; return the refused recipients."""
    try:
        parts = urlsplit(url)
        starttls = parse_qs(parts.query, keep_blank_values=True).get("starttls", ["0"])[-1]
        usual = 465 if parts.scheme == "smtps" else 587 if starttls == "1" else 25
        host, port = parts.hostname or "", usual if parts.port is None else parts.port
        # subtle: starttls=yes must not mean "no", which would send the password in the clear
        is_valid = host and port and parts.scheme in ("smtp", "smtps") and starttls in ("0", "1")
    except ValueError:  # subtle: its text may quote a part of the password
        is_valid = False
    if not is_valid:
        raise ToolError("SMTP_URL is not like smtp://user:password@host:587?starttls=1 or smtps://host")
    is_sending = False
    tls = ssl.create_default_context()  # subtle: without it smtplib believes any certificate
    try:
        if parts.scheme == "smtps":
            server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=SMTP_SECONDS, context=tls)
        else:
            server = smtplib.SMTP(host, port, timeout=SMTP_SECONDS)
        try:
            if starttls == "1" and parts.scheme == "smtp":
                server.starttls(context=tls)
            if parts.username:
                server.login(unquote(parts.username), unquote(parts.password or ""))
            is_sending = True
            return list(server.send_message(message))
        finally:
            # subtle: not `with server`, which raises on a bad answer to QUIT, when the message is long sent
            with suppress(smtplib.SMTPException, OSError):
                server.quit()
    except (smtplib.SMTPException, OSError, UnicodeError) as error:
        # subtle: without the error's text. A server may repeat the password, and a UnicodeError holds the whole login.
        codes = [code for code, _ in getattr(error, "recipients", {}).values()] or [getattr(error, "smtp_code", 0)]
        told = f"{type(error).__name__} {min(codes) or ''}".strip()
        problem = f"{parts.scheme}://{host}:{port}: {told}; check SMTP_URL, the server and the address"
        if min(codes) >= 500 or isinstance(error, UnicodeError):
            raise ToolError(problem) from None
        raise ToolUnavailable(problem, may_have_happened=is_sending and min(codes) == 0) from None
