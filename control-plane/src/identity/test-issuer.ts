// An issuer of tokens on loopback, for tests: a real HTTP server with a key set and a user endpoint.
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { exportJWK, generateKeyPair, type GenerateKeyPairResult, SignJWT } from "jose";
import { type JwtIssuer, parseJwtIssuers } from "./issuers.ts";

/** An issuer whose behavior a test decides. */
export type TestIssuer = AsyncDisposable & {
  readonly issuer: string;
  /** Its entry of the configuration. */
  configuration(extra?: Record<string, unknown>): JwtIssuer;
  /** A good token, or one with these claims changed; a claim that is undefined is left out. */
  token(claims?: Record<string, unknown>, header?: { readonly kid?: string }): Promise<string>;
  /** Replaces the signing key. The old one is no longer in the key set. */
  rotate(): Promise<void>;
  /** What the key set answers next: undefined is the key set. */
  keysAnswer: { readonly status: number; readonly body: string } | undefined;
  /** What the user endpoint answers. */
  user: unknown;
  /** Requests that arrived, by path. */
  readonly requests: Map<string, number>;
  readonly lastAuthorization: () => string | undefined;
};

export const testAudience = "authenticated";

/** Starts an issuer. Its time is given, as everywhere. */
export async function startTestIssuer(now: () => Date): Promise<TestIssuer> {
  let serial = 0;
  let key: GenerateKeyPairResult;
  let kid = "";
  let keySet = "";
  const requests = new Map<string, number>();
  let authorization: string | undefined;
  const server = createServer((request, response) => {
    const path = request.url ?? "";
    requests.set(path, (requests.get(path) ?? 0) + 1);
    if (path === "/user") {
      authorization = request.headers.authorization;
      response.end(JSON.stringify(issuer.user));
      return;
    }
    const answer = issuer.keysAnswer ?? { status: 200, body: keySet };
    response.writeHead(answer.status, { location: "/elsewhere" }).end(answer.body);
  });
  await new Promise<void>((resolve) => {
    server.listen(0, "127.0.0.1", resolve);
  });
  const { port } = server.address() as AddressInfo;
  const url = `http://127.0.0.1:${port}`;
  const issuer: TestIssuer = {
    issuer: url,
    configuration(extra = {}) {
      const [entry] = parseJwtIssuers(JSON.stringify([{ issuer: url, audience: testAudience, ...extra }]));
      if (entry === undefined) throw new Error("no entry");
      return entry;
    },
    token(claims = {}, header = {}) {
      const seconds = Math.floor(now().getTime() / 1000);
      const payload = { iss: url, aud: testAudience, sub: "user-1", iat: seconds, exp: seconds + 3600, ...claims };
      return new SignJWT(payload).setProtectedHeader({ alg: "ES256", kid, typ: "JWT", ...header }).sign(key.privateKey);
    },
    async rotate() {
      key = await generateKeyPair("ES256", { extractable: true });
      serial += 1;
      kid = `key-${serial}`;
      keySet = JSON.stringify({ keys: [{ ...(await exportJWK(key.publicKey)), kid, alg: "ES256", use: "sig" }] });
    },
    keysAnswer: undefined,
    user: {},
    requests,
    lastAuthorization: () => authorization,
    [Symbol.asyncDispose]: async () => {
      server.closeAllConnections();
      await new Promise((resolve) => {
        server.close(resolve);
      });
    },
  };
  await issuer.rotate();
  return issuer;
}
