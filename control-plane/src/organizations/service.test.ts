import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { formatApiKey, parseApiKey } from "@clodei/proto/api-key";
import { decodeJwt } from "jose";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { Role } from "@clodei/proto/gen/clodei/options/v1/options";
import { newId, type OrganizationId, type UserId } from "@clodei/proto/ids";
import { newSecret } from "@clodei/proto/secret";
import type { RoleName } from "../identity/service.ts";
import { type SystemTx, sqlStateOf } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import type { Caller } from "../rpc/caller.ts";
import { startTestCallers, type TestCallers } from "./test-callers.ts";

let callers: TestCallers;
before(async () => {
  callers = await startTestCallers();
});
after(() => callers[Symbol.asyncDispose]());

const system = <T>(work: (tx: SystemTx) => Promise<T>): Promise<T> => callers.db.database.system(work);
const createOrganization = (name: string) => system((tx) => callers.organizations.create(tx, { name }));

/** Who a bearer credential is taken for. */
const authenticate = (credential: string, organization?: string): Promise<Caller> =>
  callers.organizations.authenticate(
    new Headers({
      authorization: `Bearer ${credential}`,
      ...(organization === undefined ? {} : { "clodei-organization": organization }),
    }),
    undefined,
  );

function refused(reason: ErrorReason, ...hidden: string[]) {
  return (error: unknown): boolean => {
    assert.ok(error instanceof DomainError, String(error));
    assert.equal(error.reason, reason);
    const said = error.message + JSON.stringify(error.metadata);
    for (const text of hidden) assert.ok(!said.includes(text), said);
    return true;
  };
}

describe("API keys", () => {
  test("speak for their organization with their roles, and were verified by their maker", async () => {
    const { organizationId, adminApiKey } = await createOrganization("Iberia Labs");
    const caller = await authenticate(adminApiKey);
    assert.deepEqual(caller, {
      kind: "customer",
      organizationId,
      organizationName: "Iberia Labs",
      callerId: parseApiKey(adminApiKey)?.id,
      credential: "api_key",
      roles: new Set([Role.ADMIN]),
      emailVerified: true,
    });
    const { apiKey } = await system((tx) =>
      callers.identity.createApiKey(tx, { organizationId, name: "reader", roles: ["viewer", "compliance_officer"] }),
    );
    const reader = await authenticate(apiKey);
    assert.ok(reader.kind === "customer");
    assert.deepEqual(reader.roles, new Set([Role.VIEWER, Role.COMPLIANCE_OFFICER]));
  });

  test("that are mistyped are told apart from those that are not good, and neither error repeats the key", async () => {
    const { organizationId, adminApiKey } = await createOrganization("A");
    for (const typo of [
      adminApiKey.slice(0, -1),
      `${adminApiKey}0`,
      adminApiKey.replace("_key_", "_kei_"),
      "clodei_sk_nonsense",
    ]) {
      await assert.rejects(authenticate(typo), refused(ErrorReason.API_KEY_MALFORMED, typo));
    }
    const swapped = adminApiKey.replace(/(.)(.)(_[0-9a-f]{8})$/, "$2$1$3");
    if (swapped !== adminApiKey) {
      await assert.rejects(authenticate(swapped), refused(ErrorReason.API_KEY_MALFORMED, swapped));
    }
    const id = parseApiKey(adminApiKey)?.id;
    assert.ok(id);
    const unknown = formatApiKey({ id: newId("key"), secret: newSecret() });
    const wrongSecret = formatApiKey({ id, secret: newSecret() });
    const { apiKey: expired } = await system((tx) =>
      callers.identity.createApiKey(tx, {
        organizationId,
        name: "old",
        roles: ["viewer"],
        expireTime: new Date(Date.now() - 1),
      }),
    );
    const texts = new Set<string>();
    for (const bad of [unknown, wrongSecret, expired]) {
      await assert.rejects(authenticate(bad), (error) => {
        if (error instanceof Error) texts.add(error.message);
        return refused(ErrorReason.API_KEY_INVALID, bad)(error);
      });
    }
    assert.equal(texts.size, 1, "unknown, wrong and expired are told alike");
    assert.ok(await authenticate(adminApiKey));
  });

  test("that were revoked are refused at once", async () => {
    const { organizationId } = await createOrganization("B");
    const { id, apiKey } = await system((tx) =>
      callers.identity.createApiKey(tx, { organizationId, name: "short", roles: ["member"] }),
    );
    assert.ok(await authenticate(apiKey));
    const revoked = await system((tx) => callers.identity.revokeApiKey(tx, id));
    assert.ok(revoked?.organizationId !== undefined && revoked.operatorId === undefined);
    assert.deepEqual(await system((tx) => callers.identity.revokeApiKey(tx, id)), revoked, "for good, and once");
    await assert.rejects(authenticate(apiKey), refused(ErrorReason.API_KEY_INVALID, apiKey));
    assert.equal(await system((tx) => callers.identity.revokeApiKey(tx, newId("key"))), undefined);
  });

  test("do not act for an organization that they are not of, whether or not there is one", async () => {
    const [one, two] = [await createOrganization("One"), await createOrganization("Two")];
    assert.ok(await authenticate(one.adminApiKey, one.organizationId));
    for (const other of [two.organizationId, newId("org"), "nonsense"]) {
      await assert.rejects(authenticate(one.adminApiKey, other), refused(ErrorReason.PERMISSION_DENIED, "Two", other));
    }
  });

  test("are stored as a hash, which the login that serves requests cannot read", async () => {
    const { adminApiKey } = await createOrganization("Hashed");
    const secret = parseApiKey(adminApiKey)?.secret ?? "?";
    const rows = await system((tx) => tx.query<{ row: string }>("select k::text as row from api_keys k"));
    assert.ok(rows.length > 0);
    assert.ok(rows.every(({ row }) => !row.includes(secret)));
    await assert.rejects(
      callers.db.database.anonymous((tx) => tx.query("select secret_hash from api_keys")),
      (error) => sqlStateOf(error) === "42501",
    );
  });
});

/** When a token is refused: its end, and what clocks may differ by. */
function tokenEndOf(token: string): Date {
  const { exp = 0 } = decodeJwt(token);
  return new Date((exp + 30) * 1000);
}

describe("platform operators", () => {
  test("have keys of their own, which belong to no organization, and lose them at once", async () => {
    const { operatorId, id, apiKey } = await system((tx) =>
      callers.identity.createOperator(tx, { name: "Night shift" }),
    );
    assert.deepEqual(await authenticate(apiKey), { kind: "platform", callerId: id, credential: "api_key" });
    assert.equal(await system((tx) => callers.identity.disableOperator(tx, operatorId)), true);
    await assert.rejects(authenticate(apiKey), refused(ErrorReason.API_KEY_INVALID, apiKey));
  });

  test("can be persons with tokens, who act for an organization only where they name it and are members", async () => {
    const user = { issuer: callers.issuer.issuer, subject: "operator" };
    const { operatorId } = await system((tx) => callers.identity.createOperator(tx, { name: "Person", user }));
    const { organizationId } = await system((tx) => callers.organizations.create(tx, { name: "Own", member: user }));
    const token = await callers.issuer.token({ sub: "operator" });
    const tokenExpireTime = tokenEndOf(token);
    assert.deepEqual(await authenticate(token), {
      kind: "platform",
      callerId: operatorId,
      credential: "token",
      tokenExpireTime,
    });
    assert.equal((await authenticate(token, organizationId)).kind, "customer");
    await system((tx) => callers.identity.disableOperator(tx, operatorId));
    assert.equal((await authenticate(token)).kind, "customer", "a member, and nothing more");
  });

  test("are not made by the role operator of an organization", async () => {
    const { organizationId } = await createOrganization("C");
    const { apiKey } = await system((tx) =>
      callers.identity.createApiKey(tx, { organizationId, name: "op", roles: ["operator", "admin"] }),
    );
    assert.equal((await authenticate(apiKey)).kind, "customer");
  });
});

describe("tokens", () => {
  const join = (
    subject: string,
    organizationId: OrganizationId,
    roles: readonly RoleName[] = ["member"],
  ): Promise<UserId> =>
    system(async (tx) => {
      const userId = await callers.identity.ensureUser(tx, { issuer: callers.issuer.issuer, subject });
      await callers.organizations.setMembership(tx, organizationId, userId, roles);
      return userId;
    });

  test("of a person without an organization make a user, the same one each time, also at once", async () => {
    const token = await callers.issuer.token({ sub: "alone", email_verified: true });
    const found = await Promise.all(Array.from({ length: 5 }, () => authenticate(token)));
    const ids = new Set(found.map((caller) => (caller.kind === "user" ? caller.callerId : "?")));
    assert.equal(ids.size, 1);
    assert.ok(found.every((caller) => caller.kind === "user" && caller.emailVerified));
    const unverified = await authenticate(await callers.issuer.token({ sub: "alone" }));
    assert.ok(unverified.kind === "user" && !unverified.emailVerified);
  });

  test("act for the only organization, for the one that is named, or are told to name one of theirs", async () => {
    const [one, two, foreign] = [
      await createOrganization("Uno"),
      await createOrganization("Dos"),
      await createOrganization("Secreto"),
    ];
    const userId = await join("member", one.organizationId, ["viewer", "manager"]);
    const token = await callers.issuer.token({ sub: "member", email_verified: true });
    assert.deepEqual(await authenticate(token), {
      kind: "customer",
      organizationId: one.organizationId,
      organizationName: "Uno",
      callerId: userId,
      credential: "token",
      roles: new Set([Role.VIEWER, Role.MANAGER]),
      emailVerified: true,
      tokenExpireTime: tokenEndOf(token),
    });
    await join("member", two.organizationId);
    await assert.rejects(authenticate(token), (error) => {
      assert.ok(error instanceof DomainError);
      assert.ok(error.message.includes(one.organizationId) && error.message.includes(two.organizationId));
      return refused(ErrorReason.ORGANIZATION_REQUIRED, foreign.organizationId, "Secreto")(error);
    });
    const named = await authenticate(token, two.organizationId);
    assert.ok(named.kind === "customer" && named.organizationId === two.organizationId);
    const texts = new Set<string>();
    for (const other of [foreign.organizationId, newId("org"), "org_nonsense"]) {
      await assert.rejects(authenticate(token, other), (error) => {
        if (error instanceof Error) texts.add(error.message);
        return refused(ErrorReason.PERMISSION_DENIED, other, "Secreto")(error);
      });
    }
    assert.equal(texts.size, 1, "another's organization and one that is not there are told alike");
  });

  test("lose what their person loses: a membership, a role, everything", async () => {
    const { organizationId } = await createOrganization("Leaving");
    const userId = await join("leaver", organizationId, ["admin"]);
    const token = await callers.issuer.token({ sub: "leaver" });
    await join("leaver", organizationId, ["viewer"]);
    const caller = await authenticate(token);
    assert.ok(caller.kind === "customer");
    assert.deepEqual(caller.roles, new Set([Role.VIEWER]));
    assert.equal(await system((tx) => callers.organizations.removeMembership(tx, organizationId, userId)), true);
    assert.equal((await authenticate(token)).kind, "user");
    await system((tx) => callers.identity.disableUser(tx, userId));
    await assert.rejects(authenticate(token), refused(ErrorReason.TOKEN_INVALID, token));
  });

  test("and other headers that are no credentials at all are refused, none is anonymous", async () => {
    assert.deepEqual(await callers.organizations.authenticate(new Headers(), undefined), { kind: "anonymous" });
    for (const authorization of ["Basic dXNlcjpwYXNz", "Bearer", "Bearer a b", "nonsense"]) {
      await assert.rejects(
        callers.organizations.authenticate(new Headers({ authorization }), undefined),
        refused(ErrorReason.TOKEN_INVALID, "dXNlcjpwYXNz"),
      );
    }
    await assert.rejects(authenticate("nonsense"), refused(ErrorReason.TOKEN_INVALID));
  });
});

describe("what admitted an open stream", () => {
  const holds = (caller: Caller): Promise<boolean> => callers.organizations.stillHolds(caller);

  test("holds until the key is revoked, for an organization's key and an operator's", async () => {
    const { organizationId } = await createOrganization("Streams");
    const key = await system((tx) =>
      callers.identity.createApiKey(tx, { organizationId, name: "s", roles: ["viewer"] }),
    );
    const operator = await system((tx) => callers.identity.createOperator(tx, { name: "Streams" }));
    const [member, platform] = [await authenticate(key.apiKey), await authenticate(operator.apiKey)];
    assert.deepEqual([await holds(member), await holds(platform)], [true, true]);
    await system((tx) => callers.identity.revokeApiKey(tx, key.id));
    await system((tx) => callers.identity.disableOperator(tx, operator.operatorId));
    assert.deepEqual([await holds(member), await holds(platform)], [false, false]);
  });

  test("holds until the membership, one of its roles, the user or the token is gone", async () => {
    const { organizationId } = await createOrganization("Roles");
    const user = { issuer: callers.issuer.issuer, subject: "streamer" };
    const userId = await system((tx) => callers.identity.ensureUser(tx, user));
    const set = (roles: readonly RoleName[]): Promise<void> =>
      system((tx) => callers.organizations.setMembership(tx, organizationId, userId, roles));
    await set(["viewer", "member"]);
    const end = Math.floor(callers.time.now.getTime() / 1000) + 600;
    const token = await callers.issuer.token({ sub: "streamer", exp: end });
    const caller = await authenticate(token);
    await set(["viewer", "member", "admin"]);
    assert.equal(await holds(caller), true, "a role more");
    await set(["viewer"]);
    assert.equal(await holds(caller), false, "a role less");
    await set(["viewer", "member"]);
    const start = callers.time.now;
    callers.time.now = new Date((end + 29) * 1000);
    assert.equal(await holds(caller), true);
    callers.time.now = new Date((end + 30) * 1000);
    assert.equal(await holds(caller), false, "the token ended");
    callers.time.now = start;
    await system((tx) => callers.organizations.removeMembership(tx, organizationId, userId));
    assert.equal(await holds(caller), false, "no member any more");
    const alone = await authenticate(token);
    assert.ok(alone.kind === "user" && (await holds(alone)));
    await system((tx) => callers.identity.disableUser(tx, userId));
    assert.equal(await holds(alone), false);
  });
});

describe("row-level security", () => {
  test("shows one organization neither the keys nor the members nor the name of another", async () => {
    const [one, two] = [await createOrganization("Mine"), await createOrganization("Theirs")];
    const seen = await callers.db.database.tenant(one.organizationId, async (tx) => ({
      keys: await tx.query<{ organization_id: string }>("select organization_id from api_keys"),
      organizations: await tx.query<{ id: string }>("select id from organizations"),
      byId: await tx.query("select id from api_keys where organization_id = $1", [two.organizationId]),
    }));
    assert.deepEqual(seen.keys, [{ organization_id: one.organizationId }]);
    assert.deepEqual(seen.organizations, [{ id: one.organizationId }]);
    assert.deepEqual(seen.byId, []);
    const none = await callers.db.database.anonymous((tx) => tx.query("select id from api_keys"));
    assert.deepEqual(none, [], "no setting, no rows");
  });

  test("gives the login that serves requests no way to make a key, a role, an operator or a user", async () => {
    const { organizationId } = await createOrganization("Curious");
    for (const statement of [
      "update api_keys set roles = array['admin']",
      "insert into memberships (organization_id, user_id, roles) values ('x', 'y', array['admin'])",
      "update memberships set roles = array['admin']",
      "insert into operators (id, name) values ('opr_00000000000000000000000000', 'me')",
      "select * from users",
      "select * from operators",
      "update organizations set name = 'x'",
      "delete from api_keys",
    ]) {
      await assert.rejects(
        callers.db.database.tenant(organizationId, (tx) => tx.execute(statement)),
        (error) => sqlStateOf(error) === "42501",
        statement,
      );
    }
  });
});
