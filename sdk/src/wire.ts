/** What a platform (Node, a browser) must bring: a transport, and what it alone knows about its failures. */
import { ConnectError, type Transport } from "@connectrpc/connect";

/** A connection to the control plane. */
export type Wire = {
  readonly transport: Transport;
  /**
   * Whether this error means that the connection was lost or could not be made, so that trying again may help:
   * reset, refused, timed out. Not a certificate that does not fit, nor a host that does not exist.
   */
  isConnectionLost(error: unknown): boolean;
  /** Why no connection could be made and what to do about it; undefined where that is not the matter, or not known. */
  explain(error: unknown): string | undefined;
  /** Closes the connection. Calls in progress are canceled. */
  close(): void;
};

/** Connect's words for a stream that ended without its last message, or inside one. */
const cutShort = /^(protocol error: )?(incomplete envelope|missing EndStreamResponse)$/u;

/** Whether this is the error of a stream that was ended in order, and too early: proxies do so to what they cut. */
export function isCutShort(error: unknown): boolean {
  return error instanceof ConnectError && !error.isWireError && cutShort.test(error.rawMessage);
}

/** Where the control plane is, and how to be sure that it is it. */
export type WireOptions = {
  /** "https://api.example:8443". Plain http is accepted for loopback alone. */
  readonly endpoint: string;
  /** PEM of the authority that signed the server's certificate; the system's roots where absent. */
  readonly ca: string | undefined;
  /** How long making a connection may take; then the next try begins. */
  readonly connectTimeoutMs: number;
};
