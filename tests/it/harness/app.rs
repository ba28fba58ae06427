use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::{sync::oneshot, task::JoinHandle};
use tokio_postgres::NoTls;
use tollkeeper::{
    auth::{InitialCredential, KeyRing, MasterKey, NewAccount, generate_key_file},
    config::{AuthSettings, PasswordSettings, Secret, Settings, SigningAlgorithm},
    model::{Origin, Person, Role, Scope},
    server::{Server, ServerError},
    store::Migrator,
};
use tonic::transport::{Channel, Endpoint};

use super::{PASSWORD, cluster};

const TEMPLATE: &str = "tollkeeper_template";

/// A server in this process, on a port and a database of its own. Ends with the test.
pub(crate) struct TestApp {
    pub(crate) address: SocketAddr,
    /// Of the operations port.
    pub(crate) ops_address: SocketAddr,
    pub(crate) database_url: String,
    /// A key of a service account with every scope.
    pub(crate) service_key: String,
    /// E-mail address of an administrator whose password is [`PASSWORD`].
    pub(crate) admin_email: String,
    /// One connection, shared by all clients that [`TestApp`] hands out.
    pub(crate) channel: Channel,
    server: RunningServer,
    settings: Settings,
    /// Where replicas find the signing keys, unless the settings named a folder.
    _keys: tempfile::TempDir,
}

impl TestApp {
    pub(crate) async fn spawn() -> Self {
        Self::spawn_with(|_| {}).await
    }

    /// Spawns a server whose settings `change` has changed.
    pub(crate) async fn spawn_with(change: impl FnOnce(&mut Settings)) -> Self {
        let keys = tempfile::tempdir().expect("a temporary folder");
        let mut settings = settings(new_database().await);
        keys.path().clone_into(&mut settings.auth.key_dir);
        // Patient with a busy machine.
        settings.quota.recall_bound = Duration::from_secs(3);
        change(&mut settings);
        let server = RunningServer::start(&settings)
            .await
            .expect("the server starts");
        Self::introduce(server, settings, keys).await
    }

    /// A further server on the same database: another replica.
    pub(crate) async fn replica(&self) -> RunningServer {
        RunningServer::start(&self.settings)
            .await
            .expect("the replica starts")
    }

    pub(crate) fn running(&self) -> &RunningServer {
        &self.server
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Stops the server and waits for the end, as SIGTERM would.
    pub(crate) async fn stop(self) -> Result<(), ServerError> {
        self.server.stop().await
    }

    /// Runs SQL on the test's database; for what no RPC can show or bring about.
    pub(crate) async fn sql(&self, statement: &str) -> Vec<tokio_postgres::Row> {
        let (client, connection) = tokio_postgres::connect(&self.database_url, NoTls)
            .await
            .expect("connected");
        let connection = tokio::spawn(connection);
        let rows = client.query(statement, &[]).await.expect(statement);
        drop(client);
        connection
            .await
            .expect("no panic")
            .expect("closed in order");
        rows
    }

    /// The one number that a statement answers.
    pub(crate) async fn count(&self, statement: &str) -> i64 {
        self.sql(statement).await.first().expect("one row").get(0)
    }

    async fn introduce(server: RunningServer, settings: Settings, keys: tempfile::TempDir) -> Self {
        let admin_email = "admin@example.com".to_owned();
        let origin = Origin::operator();
        let admin = NewAccount {
            person: Person {
                email: admin_email.parse().expect("valid"),
                username: "admin".parse().expect("valid"),
                full_name: "Administrator".parse().expect("valid"),
            },
            credential: InitialCredential::Password(PASSWORD.to_owned()),
            role: Role::Admin,
            tier: "free".parse().expect("valid"),
        };
        server
            .auth
            .create_account(admin, &origin)
            .await
            .expect("created");
        let (_, service_key) = server
            .auth
            .create_service_account(
                "all-scopes".parse().expect("valid"),
                Scope::ALL.into_iter().collect(),
                &origin,
            )
            .await
            .expect("created");
        Self {
            address: server.address,
            ops_address: server.ops_address.expect("no test turns it off"),
            database_url: settings.database.url.expose().to_owned(),
            service_key,
            admin_email,
            channel: server.channel(),
            server,
            settings,
            _keys: keys,
        }
    }
}

/// A server in this process. Dropping it stops it.
pub(crate) struct RunningServer {
    pub(crate) address: SocketAddr,
    pub(crate) ops_address: Option<SocketAddr>,
    pub(crate) auth: tollkeeper::auth::Auth,
    pub(crate) usage: tollkeeper::usage::Usage,
    pub(crate) tls: Option<tollkeeper::server::Tls>,
    shutdown: Option<oneshot::Sender<()>>,
    ended: JoinHandle<Result<(), ServerError>>,
}

impl RunningServer {
    pub(crate) async fn start(settings: &Settings) -> Result<Self, ServerError> {
        let (keys, master_key) = keys(settings);
        let server = Server::bind(settings, keys, &master_key).await?;
        let address = server.local_addr().expect("bound");
        let ops_address = server.ops_addr();
        let auth = server.auth().clone();
        let usage = server.usage().clone();
        let tls = server.tls().cloned();
        let (shutdown, asked) = oneshot::channel::<()>();
        let ended = tokio::spawn(server.run(async {
            let _ = asked.await;
        }));
        Ok(Self {
            address,
            ops_address,
            auth,
            usage,
            tls,
            shutdown: Some(shutdown),
            ended,
        })
    }

    /// A connection of its own to this server, made on first use.
    pub(crate) fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address))
            .expect("an address")
            .connect_lazy()
    }

    /// A connection from another address of this machine.
    pub(crate) fn channel_from(&self, address: [u8; 4]) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address))
            .expect("an address")
            .local_address(Some(address.into()))
            .connect_lazy()
    }

    pub(crate) async fn stop(mut self) -> Result<(), ServerError> {
        let _ = self.shutdown.take().expect("stopped once").send(());
        self.ended.await.expect("no panic")
    }
}

/// Settings of a test: real everything, cheap hashes, a free port.
fn settings(database_url: String) -> Settings {
    let mut settings = Settings {
        dev: true,
        ..Settings::default()
    };
    settings.server.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    settings.ops.listen = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    settings.database.url = Secret::new(database_url);
    settings.database.pool_size = 8;
    // Whoever tests it turns it on.
    settings.throttle.account_failures = 0;
    settings.throttle.address_failures = 0;
    settings.password = PasswordSettings {
        argon2_memory_kib: 64,
        argon2_iterations: 1,
        bcrypt_cost: 4,
        ..PasswordSettings::default()
    };
    settings
}

/// The signing keys of the settings; the first server to look makes one.
fn keys(settings: &Settings) -> (KeyRing, MasterKey) {
    let AuthSettings {
        algorithm,
        key_dir,
        jwt_secret,
        ..
    } = &settings.auth;
    let ring = if *algorithm == SigningAlgorithm::Hs256 {
        KeyRing::from_secret(jwt_secret)
    } else {
        KeyRing::from_folder(key_dir, *algorithm).or_else(|_| {
            generate_key_file(key_dir, *algorithm, false, chrono::Utc::now())?;
            KeyRing::from_folder(key_dir, *algorithm)
        })
    };
    let master_key = MasterKey::new(b"the master key of the tests, not a secret");
    (ring.expect("a key"), master_key)
}

/// A migrated database of the test's own.
async fn new_database() -> String {
    tokio::task::spawn_blocking(|| {
        cluster::template_once(TEMPLATE, migrate);
        cluster::create_from_template(TEMPLATE)
    })
    .await
    .expect("no panic")
}

fn migrate(url: &str) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(async {
            let mut migrator = Migrator::connect(url).await.expect("connected");
            migrator.up().expect("migrated");
        });
}
