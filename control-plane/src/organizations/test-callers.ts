// Identity and organizations over a real database and a real issuer of tokens, for tests.
import { IdentityService } from "../identity/service.ts";
import { startTestIssuer, type TestIssuer } from "../identity/test-issuer.ts";
import { startTestDatabase, type TestDatabase } from "../platform/test-database.ts";
import { OrganizationsService } from "./service.ts";

/** Everything that says who calls. */
export type TestCallers = AsyncDisposable & {
  readonly db: TestDatabase;
  readonly issuer: TestIssuer;
  readonly identity: IdentityService;
  readonly organizations: OrganizationsService;
  /** The time that all of them see. */
  readonly time: { now: Date };
};

/** Starts it. Takes about a second, for the database. */
export async function startTestCallers(): Promise<TestCallers> {
  const time = { now: new Date() };
  const clock = (): Date => time.now;
  const db = await startTestDatabase();
  const issuer = await startTestIssuer(clock);
  const configuration = issuer.configuration({ emailVerifiedClaim: "email_verified" });
  const identity = new IdentityService({ issuers: [configuration], clock, log: db.log });
  const organizations = new OrganizationsService({ database: db.database, identity, clock });
  return {
    db,
    issuer,
    identity,
    organizations,
    time,
    [Symbol.asyncDispose]: async () => {
      await issuer[Symbol.asyncDispose]();
      await db[Symbol.asyncDispose]();
    },
  };
}
