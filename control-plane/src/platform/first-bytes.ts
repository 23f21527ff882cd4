// The first bytes of a connection, looked at before anybody else serves it.
import type { Socket } from "node:net";

/** What the first bytes say, and how many of them nobody else shall see. */
export type Verdict<T> = { readonly value: T; readonly takenBytes: number };

/**
 * Reads until `judge` has a verdict, and puts back what that leaves. The socket is paused then; whoever takes it over
 * gets what was put back first. Rejects where the connection, or its time, ends before.
 * @param judge looks at all that came so far; undefined: it needs more. It bounds what it waits for, and what it throws
 *   this rejects with.
 */
export function readFirstBytes<T>(
  socket: Socket,
  timeoutMs: number,
  judge: (bytes: Buffer) => Verdict<T> | undefined,
): Promise<T> {
  const { promise, resolve, reject } = Promise.withResolvers<T>();
  let bytes: Buffer = Buffer.alloc(0);
  const onData = (chunk: Buffer): void => {
    bytes = bytes.length === 0 ? chunk : Buffer.concat([bytes, chunk]);
    try {
      const verdict = judge(bytes);
      if (verdict === undefined) return;
      stop();
      socket.pause();
      if (verdict.takenBytes < bytes.length) socket.unshift(bytes.subarray(verdict.takenBytes));
      resolve(verdict.value);
    } catch (error) {
      fail(error);
    }
  };
  const fail = (error: unknown): void => {
    stop();
    reject(error);
  };
  const onClose = (): void => fail(new Error("the connection ended before it said anything"));
  const onError = (error: Error): void => fail(error);
  const timer = setTimeout(() => {
    fail(new Error(`the connection said nothing that can be judged within ${timeoutMs} ms`));
  }, timeoutMs);
  const stop = (): void => {
    clearTimeout(timer);
    socket.off("data", onData);
    socket.off("close", onClose);
    socket.off("error", onError);
  };
  socket.on("data", onData);
  socket.on("close", onClose);
  socket.on("error", onError);
  return promise;
}
