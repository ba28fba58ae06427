//! What the service under test works on: a Postgres of its own, keys, a caller, people with sessions.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use chrono::Utc;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use tokio_postgres::NoTls;
use tollkeeper::{
    auth::{generate_key_file, list_key_files},
    config::SigningAlgorithm,
    embedded::{Embedded, Options},
    proto::tollkeeper::auth::v1::{CreateApiKeyRequest, auth_service_client::AuthServiceClient},
};
use tonic::{Request, transport::Channel};
use uuid::Uuid;

use crate::process::{Postgres, Server};

const MASTER_KEY: &str = "3f9c0a7be1d2458696e0f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6";
/// Longer than any run; the service does not care how long tokens last.
const TOKEN_SECS: i64 = 12 * 3600;
/// As many as the service has connections.
const KEYS_AT_ONCE: usize = 16;

/// A migrated database with people in it. [`Self::close`] stops its Postgres.
pub(crate) struct Fixture {
    pub(crate) people: Vec<Person>,
    pub(crate) service_key: String,
    program: PathBuf,
    settings: Vec<(String, String)>,
    signer: Signer,
    postgres: Embedded,
    folder: tempfile::TempDir,
}

/// A user with a live session.
#[derive(Clone, Copy)]
pub(crate) struct Person {
    pub(crate) user: Uuid,
    session: Uuid,
}

struct Signer {
    key: EncodingKey,
    header: Header,
}

impl Fixture {
    /// Starts Postgres with its defaults and puts `people` into the database. Their usernames are
    /// `person-1` and so on; all have the password that `password_hash` is of, if any.
    pub(crate) async fn start(
        program: &Path,
        people: usize,
        password_hash: Option<&str>,
    ) -> anyhow::Result<Self> {
        Self::start_with(program, people, password_hash, Vec::new()).await
    }

    /// [`Self::start`] with further settings of Postgres.
    pub(crate) async fn start_with(
        program: &Path,
        people: usize,
        password_hash: Option<&str>,
        settings_of_postgres: Vec<(String, String)>,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("toll-bench").tempdir()?;
        // Postgres may run under another account, which must get through.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o711))?;
        let keys = folder.path().join("keys");
        generate_key_file(&keys, SigningAlgorithm::EdDsa, false, Utc::now())?;
        let postgres = Embedded::start(Options {
            data_dir: folder.path().join("data"),
            settings: settings_of_postgres,
        })
        .await?;
        let settings = [
            ("DATABASE_URL", postgres.database_url()),
            ("TOLLKEEPER_AUTH_KEY_DIR", &keys.to_string_lossy()),
            ("TOLLKEEPER_AUTH_MASTER_KEY", MASTER_KEY),
        ];
        let settings: Vec<_> = settings
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        let mut fixture = Self {
            people: Vec::new(),
            service_key: String::new(),
            program: program.to_owned(),
            signer: Signer::of(&keys)?,
            settings,
            postgres,
            folder,
        };
        // The first start makes the schema and the partitions.
        drop(fixture.serve("first-start", &[])?);
        fixture.service_key = fixture.service_account()?;
        fixture.people = fixture.populate(people, password_hash).await?;
        Ok(fixture)
    }

    /// Starts the service on this database as production would, with further settings.
    pub(crate) fn serve(&self, name: &str, further: &[(&str, &str)]) -> anyhow::Result<Server> {
        let further = further
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let settings: Vec<_> = self.settings.iter().cloned().chain(further).collect();
        let log = self.folder.path().join(format!("{name}.log"));
        Server::service(&self.program, &settings, &log)
    }

    /// Carries out statements, as the owner of the database.
    pub(crate) async fn sql(&self, statements: &str) -> anyhow::Result<()> {
        let (client, connection) = tokio_postgres::connect(self.database_url(), NoTls).await?;
        let connection = tokio::spawn(connection);
        client.batch_execute(statements).await?;
        drop(client);
        Ok(connection.await??)
    }

    pub(crate) fn database_url(&self) -> &str {
        self.postgres.database_url()
    }

    /// Its Postgres, to look at the processor time it uses.
    pub(crate) fn postgres(&self) -> anyhow::Result<Postgres> {
        Postgres::of(&self.folder.path().join("data/postgres"))
    }

    /// Where all of this lies.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The folder of the signing keys.
    pub(crate) fn key_dir(&self) -> &str {
        let found = self
            .settings
            .iter()
            .find(|(name, _)| name == "TOLLKEEPER_AUTH_KEY_DIR");
        found.map_or("", |(_, folder)| folder)
    }

    /// Signs a new access token of a person's session, as the service would.
    pub(crate) fn token(&self, person: &Person) -> anyhow::Result<String> {
        self.signer.sign(person, TOKEN_SECS)
    }

    /// A token of a person's session that has expired.
    pub(crate) fn expired_token(&self, person: &Person) -> anyhow::Result<String> {
        self.signer.sign(person, -60)
    }

    /// Makes an API key for each of the first `count` people, over the wire.
    pub(crate) async fn api_keys(
        &self,
        server: &Server,
        count: usize,
    ) -> anyhow::Result<Vec<String>> {
        let url = format!("http://{}", server.address);
        let channel = Channel::from_shared(url)?.connect().await?;
        let made = self.people.iter().take(count).map(|person| {
            let mut auth = AuthServiceClient::new(channel.clone());
            async move {
                let request = CreateApiKeyRequest {
                    name: "bench".to_owned(),
                    ..Default::default()
                };
                let request = with_bearer(request, &self.token(person)?)?;
                Ok(auth.create_api_key(request).await?.into_inner().key)
            }
        });
        stream::iter(made)
            .buffered(KEYS_AT_ONCE)
            .try_collect()
            .await
    }

    pub(crate) async fn close(self) -> anyhow::Result<()> {
        Ok(self.postgres.stop().await?)
    }

    fn command(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(&self.program)
            .args(args)
            .env_clear()
            .envs(self.settings.iter().map(|(key, value)| (key, value)))
            .output()?;
        ensure!(
            output.status.success(),
            "tollkeeper {} failed:\n{}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn service_account(&self) -> anyhow::Result<String> {
        let said = self.command(&[
            "services",
            "create",
            "--name",
            "bench",
            "--scope",
            "tokens.validate",
            "--scope",
            "quota",
            "--scope",
            "usage.write",
            "--scope",
            "usage.read",
            "--scope",
            "admin",
            "--scope",
            "gateway",
        ])?;
        let key = said.lines().find_map(|line| line.strip_prefix("key "));
        Ok(key.context("no key was printed")?.trim().to_owned())
    }

    /// By SQL: a hundred thousand logins would take half an hour of hashing.
    async fn populate(&self, count: usize, hash: Option<&str>) -> anyhow::Result<Vec<Person>> {
        let people: Vec<_> = (0..count)
            .map(|_| Person {
                user: Uuid::now_v7(),
                session: Uuid::now_v7(),
            })
            .collect();
        let users: Vec<_> = people.iter().map(|p| p.user.to_string()).collect();
        let sessions: Vec<_> = people.iter().map(|p| p.session.to_string()).collect();
        let (client, connection) =
            tokio_postgres::connect(self.postgres.database_url(), NoTls).await?;
        let connection = tokio::spawn(connection);
        client
            .execute(
                "INSERT INTO users (id, email, username, password_hash, tier)
                 SELECT id::uuid, 'person-' || n || '@example.com', 'person-' || n, $2, 'advanced'
                 FROM unnest($1::text[]) WITH ORDINALITY AS ids (id, n)",
                &[&users, &hash],
            )
            .await?;
        client
            .execute(
                "INSERT INTO sessions (id, user_id, rotated_at, created_at, last_used_at,
                                       idle_expires_at, absolute_expires_at)
                 SELECT id::uuid, user_id::uuid, now(), now(), now(), now() + interval '7 days',
                        now() + interval '30 days'
                 FROM unnest($1::text[], $2::text[]) AS ids (id, user_id)",
                &[&sessions, &users],
            )
            .await?;
        client
            .execute(
                "INSERT INTO monthly_model_usage (user_id, month, model, input_tokens, output_tokens,
                     cached_input_tokens, cache_write_tokens, reasoning_tokens, request_count)
                 SELECT id::uuid, to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM'), 'm', 1000, 500, 0, 0, 0, 1
                 FROM unnest($1::text[]) AS ids (id)",
                &[&users],
            )
            .await?;
        // One by one: together they would be a transaction, in which VACUUM cannot run.
        client.batch_execute("VACUUM ANALYZE").await?;
        client.batch_execute("CHECKPOINT").await?;
        drop(client);
        connection.await??;
        Ok(people)
    }
}

impl Signer {
    fn of(folder: &Path) -> anyhow::Result<Self> {
        let keys = list_key_files(folder)?;
        let key = keys.last().context("no key was made")?;
        let mut header = Header::new(Algorithm::EdDSA);
        header.typ = Some("at+jwt".to_owned());
        header.kid = Some(key.kid.clone());
        let key = EncodingKey::from_ed_pem(&fs::read(&key.path)?)?;
        Ok(Self { key, header })
    }

    fn sign(&self, person: &Person, ttl_secs: i64) -> anyhow::Result<String> {
        // A second ago: whole seconds round down here and there alike.
        let issued_at = Utc::now().timestamp() - 1 + ttl_secs.min(0);
        let claims = serde_json::json!({
            "iss": "tollkeeper", "sub": person.user, "aud": "tollkeeper",
            "exp": issued_at + ttl_secs.max(1), "iat": issued_at,
            "jti": Uuid::now_v7(), "sid": person.session, "epoch": 0,
        });
        Ok(jsonwebtoken::encode(&self.header, &claims, &self.key)?)
    }
}

/// A message as a caller sends it.
pub(crate) fn with_bearer<T>(message: T, credential: &str) -> anyhow::Result<Request<T>> {
    let mut request = Request::new(message);
    let value = format!("Bearer {credential}").parse()?;
    request.metadata_mut().insert("authorization", value);
    Ok(request)
}
