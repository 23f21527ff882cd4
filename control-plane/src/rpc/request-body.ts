// How long a request may take to come, and what becomes of a body for which the answer did not wait.
import { constants, type ServerHttp2Stream } from "node:http2";
import { onceOf, type Request, type Response } from "./public-server.ts";

/** Time for the rest of a body for which the answer did not wait. */
const unreadBodyMs = 1_000;

/**
 * Gives up a request that does not come whole in time: a body that trickles in holds memory and a stream. Only gRPC's own
 * content type can carry a client's stream.
 *
 * @param toError Makes what is thrown where the body is read, which answers in the request's protocol. Over HTTP/1.1 the
 * connection ends instead.
 */
export function limitBodyTime(request: Request, response: Response, limitMs: number, toError: () => Error): void {
  const endUnread = "stream" in response ? endOnceAnswered(response.stream) : undefined;
  const timer = setTimeout(() => {
    if (hasComeWhole(request)) return;
    const error = toError();
    onceOf(request, "error", () => undefined);
    request.destroy(endUnread === undefined ? undefined : error);
    endUnread?.();
  }, limitMs);
  const stop = (): void => clearTimeout(timer);
  onceOf(request, "end", stop);
  onceOf(response, "close", stop);
}

/** Whether the client has sent all of it, read or not: the body of a GET is not. */
function hasComeWhole(request: Request): boolean {
  return "stream" in request ? request.stream.state.remoteClose === 1 : request.complete;
}

/**
 * Ends a stream of HTTP/2 whose answer did not wait for the whole body. Until both have ended the stream counts as open,
 * for its connection and for its caller, and a client that is not read from may wait for ever. (In HTTP/1.1 Node drops
 * such a body, for as long as it takes any request.)
 *
 * @returns What does so also where no answer's end is told: that of a HEAD is over before it begins.
 */
function endOnceAnswered(stream: ServerHttp2Stream): () => void {
  let timer: NodeJS.Timeout | undefined;
  const closeSoon = (): void => {
    timer = setTimeout(() => {
      // The trailers may be behind data that the client does not take. Once they are out, this code says that nothing was
      // wrong (RFC 9113, section 8.1).
      if (stream.state.localClose === 1) stream.close(constants.NGHTTP2_NO_ERROR);
      else closeSoon();
    }, unreadBodyMs);
  };
  const end = (): void => {
    if (stream.readableEnded || stream.destroyed || timer !== undefined) return;
    stream.removeAllListeners("data").resume();
    closeSoon();
  };
  const stop = (): void => clearTimeout(timer);
  stream.once("finish", end).once("end", stop).once("close", stop);
  return end;
}
