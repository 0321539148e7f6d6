"""gcp-storage-emulator, and what TensorStore needs beside it: the generation of an object, and writes on condition.

python tests/bucket/emulator.py PORT BUCKET
"""

import functools
import sys
from collections.abc import Callable
from http import HTTPStatus
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


if __name__ == "__main__":
    changed = {
        objects.get: with_generation(objects.get),
        objects.download: with_generation(objects.download),
        objects.insert: on_condition(objects.insert),
    }
    objects.insert = changed[objects.insert]
    for _, handlers in server.HANDLERS:
        handlers.update({method: changed.get(handler, handler) for method, handler in handlers.items()})
    server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]).run()
