# Creates an instance, follows its output for three lines, cancels, and deletes it. It needs grpcio and protobuf, and no
# generated code: the server tells its schema by reflection. On Debian: apt-get install python3-grpcio. After npm start:
#
#   (set -a; . .data/keys/sdk.env; /usr/bin/python3 docs/examples/instance.py)
import os
import sys
import uuid
from urllib.parse import urlsplit

import grpc
from google.protobuf import descriptor_pb2, message_factory, text_format

# The part of gRPC's reflection that is used here.
REFLECTION = """
name: "reflection.proto" package: "grpc.reflection.v1" syntax: "proto3"
message_type { name: "ServerReflectionRequest"
  field { name: "file_containing_symbol" number: 4 type: TYPE_STRING label: LABEL_OPTIONAL } }
message_type { name: "ServerReflectionResponse"
  field { name: "file_descriptor_response" number: 4 type: TYPE_MESSAGE label: LABEL_OPTIONAL
          type_name: ".grpc.reflection.v1.FileDescriptorResponse" } }
message_type { name: "FileDescriptorResponse"
  field { name: "file_descriptor_proto" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
"""


def messages_of(channel, *symbols):
    """The classes of all messages in the files of these symbols, and in what those import, by their full names."""
    own = message_factory.GetMessages([text_format.Parse(REFLECTION, descriptor_pb2.FileDescriptorProto())])
    request = own["grpc.reflection.v1.ServerReflectionRequest"]
    ask = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request.SerializeToString,
        own["grpc.reflection.v1.ServerReflectionResponse"].FromString,
    )
    files = {}
    for answer in ask(iter([request(file_containing_symbol=symbol) for symbol in symbols]), timeout=30):
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            files[file.name] = file
    return message_factory.GetMessages(list(files.values()))


class Instances:
    """clodei.v1.InstanceService, each method by its name."""

    def __init__(self, endpoint, api_key, ca):
        credentials = grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(ca), grpc.access_token_call_credentials(api_key)
        )
        self.channel = grpc.secure_channel(urlsplit(endpoint).netloc, credentials)
        self.messages = messages_of(
            self.channel, "clodei.v1.InstanceService", "google.rpc.Status", "google.rpc.ErrorInfo"
        )

    def call(self, method, timeout=30, **fields):
        """A call with one answer."""
        return self._method(self.channel.unary_unary, method)(self._request(method, fields), timeout=timeout)

    def stream(self, method, timeout=None, **fields):
        """A call that answers with a stream: iterate over it, and cancel() it where it has not ended."""
        return self._method(self.channel.unary_stream, method)(self._request(method, fields), timeout=timeout)

    def details(self, error):
        """The details of an error by their types: google.rpc.ErrorInfo, google.rpc.BadRequest, …"""
        packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
        status = self.messages["google.rpc.Status"].FromString(packed)
        named = [(detail.TypeName(), detail.value) for detail in status.details]
        return {name: self.messages[name].FromString(value) for name, value in named if name in self.messages}

    def _request(self, method, fields):
        return self.messages[f"clodei.v1.{method}Request"](**fields)

    def _method(self, kind, method):
        request, response = (self.messages[f"clodei.v1.{method}{part}"] for part in ("Request", "Response"))
        return kind(f"/clodei.v1.InstanceService/{method}", request.SerializeToString, response.FromString)


def main():
    with open(os.environ["CLODEI_CA_FILE"], "rb") as file:
        instances = Instances(os.environ["CLODEI_ENDPOINT"], os.environ["CLODEI_API_KEY"], file.read())
    spec = {
        "image": os.environ.get("CLODEI_IMAGE", "busybox"),
        "command": ["sh", "-c", "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.2; done"],
        "stop_grace": {"seconds": 1},
    }
    try:
        instance = instances.call("CreateInstance", spec=spec, idempotency_key=str(uuid.uuid4())).instance
        print("created", instance.id)
        logs = instances.stream("StreamLogs", instance_id=instance.id, follow=True)
        lines = 0
        for message in logs:
            sys.stdout.write(message.chunk.data.decode())
            lines += message.chunk.data.count(b"\n")
            if lines >= 3:
                break
        logs.cancel()
        instances.call("DeleteInstance", instance_id=instance.id)
        print("deleting", instance.id)
    except grpc.RpcError as error:
        print(error.code().name, error.details())
        for name, detail in instances.details(error).items():
            print(name, text_format.MessageToString(detail, as_one_line=True))
        sys.exit(1)


main()
