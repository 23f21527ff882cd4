// The control plane's two listeners as far as an agent sees them, for tests: real TLS, real gRPC, and answers that the
// test gives. What the real one does with a message is tested where the real one is.

import { createSecureServer } from "node:http2";
import type { Http2SecureServer, ServerHttp2Session } from "node:http2";
import type { AddressInfo } from "node:net";
import type { TLSSocket } from "node:tls";
import type { ConnectRouter } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import type { Issued, TestAuthority } from "./authority.ts";

/** A listener on loopback. */
export interface TestListener extends AsyncDisposable {
  readonly port: number;
  readonly url: string;
  /** Certificates that clients showed, newest last. */
  readonly clientSerials: readonly string[];
  /** How many requests came. */
  readonly requests: () => number;
  /** Cuts every connection without a word. */
  readonly cut: () => void;
}

/** Listens with a certificate of the authority. `clientCa`: only clients with a certificate under it, by TLS 1.3. */
export async function listen(options: {
  readonly issued: Issued;
  readonly clientCa?: TestAuthority;
  readonly port?: number;
  readonly maxVersion?: "TLSv1.2" | "TLSv1.3";
  readonly routes: (router: ConnectRouter) => void;
}): Promise<TestListener> {
  const sessions = new Set<ServerHttp2Session>();
  const clientSerials: string[] = [];
  let requests = 0;
  const handler = connectNodeAdapter({ routes: options.routes, grpc: true, grpcWeb: false, connect: true });
  const server: Http2SecureServer = createSecureServer(
    {
      key: options.issued.keyPem,
      cert: options.issued.certificatePem,
      ...(options.clientCa === undefined
        ? {}
        : {
            requestCert: true,
            rejectUnauthorized: true,
            ca: options.clientCa.rootPem,
            minVersion: options.maxVersion ?? "TLSv1.3",
            maxVersion: options.maxVersion ?? "TLSv1.3",
          }),
    },
    (request, response) => {
      requests += 1;
      handler(request, response);
    },
  );
  server.on("session", (session) => {
    sessions.add(session);
    session.on("error", () => undefined);
    session.on("close", () => sessions.delete(session));
    const serial = (session.socket as TLSSocket).getPeerX509Certificate()?.serialNumber;
    if (serial !== undefined) clientSerials.push(serial);
  });
  server.on("tlsClientError", () => undefined);
  const listening = Promise.withResolvers<void>();
  server.once("error", listening.reject);
  server.listen(options.port ?? 0, "127.0.0.1", () => listening.resolve());
  await listening.promise;
  const { port } = server.address() as AddressInfo;
  const cut = (): void => {
    for (const session of sessions) session.destroy();
  };
  return {
    port,
    url: `https://localhost:${port}`,
    clientSerials,
    requests: () => requests,
    cut,
    [Symbol.asyncDispose]: async () => {
      cut();
      const closed = Promise.withResolvers<void>();
      server.close(() => closed.resolve());
      await closed.promise;
    },
  };
}
