"""gcp-storage-emulator, and what it lacks: generations of objects and writes on condition, which TensorStore needs; and
the last bytes of an upload where they are a newline, which the emulator takes for a part of the message.

python tests/store/emulator.py PORT BUCKET
"""

import functools
import re
import sys
from collections.abc import Callable
from email.parser import BytesParser
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage: Any, bucket: str, name: str) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def with_generation(download: Callable) -> Callable:
    @functools.wraps(download)
    def answer(request, response, storage, *args, **kwargs):
        response["x-goog-generation"] = generation(storage, request.params["bucket_name"], request.params["object_id"])
        return download(request, response, storage, *args, **kwargs)

    return answer


def on_condition(insert: Callable) -> Callable:
    @functools.wraps(insert)
    def answer(request, response, storage, *args, **kwargs):
        wanted, name = (request.query.get(field, [None])[0] for field in ("ifGenerationMatch", "name"))
        if wanted is not None and wanted != generation(storage, request.params["bucket_name"], name):
            response.status = HTTPStatus.PRECONDITION_FAILED
            return None
        return insert(request, response, storage, *args, **kwargs)

    return answer


def refuse(request, response, storage, *args, **kwargs):
    response.status = HTTPStatus.BAD_REQUEST


class ExactParser:
    """Of an upload in two parts, what the object is and its bytes, in the place of email's parser."""

    def parsebytes(self, message: bytes) -> Any:
        header, _, body = message.partition(b"\r\n")
        if b"multipart/related" not in header:  # several requests at once
            return BytesParser().parsebytes(message)
        boundary = b"--" + re.search(rb'boundary="?([^";]+)', header)[1]
        parts = body.split(boundary)[1:3]
        return SimpleNamespace(get_payload=lambda: [self._part(part) for part in parts])

    def _part(self, part: bytes) -> Any:
        newline = b"\r\n" if part.startswith(b"\r\n") else b"\n"  # TensorStore's and gcsfs's
        headers, _, content = part.removeprefix(newline).partition(2 * newline)
        content = content.removesuffix(newline)
        kind = re.search(rb"(?i)content-type: *([^\s;]+)", headers)[1].decode()
        return SimpleNamespace(get_payload=lambda decode=False: content, get_content_type=lambda: kind)


if __name__ == "__main__":
    server.BytesParser = ExactParser
    changed = {
        objects.get: with_generation(objects.get),
        objects.download: with_generation(objects.download),
        objects.insert: on_condition(objects.insert),
    }
    objects.insert = changed[objects.insert]
    # Without this it says 501, "not implemented", which gcsfs tries for a minute before it copies.
    server.HANDLERS = ((r".*/moveTo/.*", {"POST": refuse}), *server.HANDLERS)
    for _, handlers in server.HANDLERS:
        handlers.update({method: changed.get(handler, handler) for method, handler in handlers.items()})
    server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]).run()
