//! The composition root: builds every part, serves, drains. The only room that sees them all.

mod connection;
mod serving;
mod tls;
mod workers;

use std::{future::Future, io, net::SocketAddr, time::Duration};

use chrono::Utc;
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::watch,
    task::{JoinError, JoinSet},
    time::{Instant, sleep, timeout},
};
use tonic_health::server::{HealthReporter, HealthService};
use tower::Layer as _;
use tracing::{error, info, warn};

pub use connection::Connection;
pub use serving::serve;
pub use tls::{Tls, TlsError};
pub use workers::{Incoming, WorkerGone, Workers};

use crate::{
    auth::{Auth, KeyRing, MasterKey},
    clock::BootTime,
    config::{self, GatewaySettings, ServerSettings, Settings},
    error::Error,
    grpc::{
        self, AccessLayer, Afterwards, CallEnd, CallLayer, CallMetrics, MemoryLayer, Rules,
        RulesError, TrustedProxies,
        health::{self, Readiness},
    },
    mail::{MailError, Mailer},
    ops,
    proto::DESCRIPTOR_SET,
    store::{Migrator, Store},
    tasks::{self, Delivery, Mailing, Retention, Upkeep},
    usage::{HandleKey, TiersError, Usage, load_tiers},
    webhook::Webhook,
};

/// How long the first call waits for the database to be heard of.
const FIRST_WORDS: Duration = Duration::from_secs(2);

/// How long the answers to calls that were cut may take to leave.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why a server did not start or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("cannot listen on {address} (setting ops.listen; empty: not at all)")]
    ListenForOps {
        address: SocketAddr,
        source: io::Error,
    },
    #[error(transparent)]
    Tiers(#[from] TiersError),
    #[error(transparent)]
    Mail(#[from] MailError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Rules(#[from] RulesError),
    #[error("the descriptor set cannot be read: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("cannot migrate the database (setting database.url)")]
    Migrate(#[source] Error),
    #[error(transparent)]
    Service(#[from] Error),
    #[error("cannot start the threads that serve: {0}")]
    Threads(#[source] io::Error),
    #[error(transparent)]
    Worker(#[from] WorkerGone),
    #[error("a background task has ended")]
    Task(Option<JoinError>),
}

/// A server that is ready to serve: migrated, bound, not yet accepting.
pub struct Server {
    settings: ServerSettings,
    gateway: GatewaySettings,
    tls: Option<Tls>,
    listener: TcpListener,
    ops: Option<TcpListener>,
    rules: Rules,
    auth: Auth,
    usage: Usage,
    upkeep: Upkeep,
    delivery: Delivery,
    mailing: Mailing,
    store: Store,
}

impl Server {
    /// Migrates the database, makes the partitions of these months, and binds the address.
    ///
    /// # Errors
    /// The first thing that is in the way.
    pub async fn bind(
        settings: &Settings,
        keys: KeyRing,
        master_key: &MasterKey,
    ) -> Result<Self, ServerError> {
        let rules = Rules::from_descriptor_set(DESCRIPTOR_SET)?;
        let tiers = load_tiers(&settings.usage.tiers_file)?;
        let tls = Tls::load(&settings.tls)?;
        let mailer = Mailer::new(&settings.mail)?;
        let webhook = Webhook::new(&settings.webhook).map_err(Error::internal)?;
        let address = settings.server.listen;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| ServerError::Listen { address, source })?;
        migrate(settings.database.url.expose())
            .await
            .map_err(ServerError::Migrate)?;
        let store = Store::new(&settings.database)?;
        // The default ones take what has none; upkeep tries again.
        if let Err(error) = tasks::make_partitions(&store, Utc::now()).await {
            warn!(error = error.with_causes(), "partitions could not be made");
        }
        // Only now: a probe is refused rather than left without an answer.
        let ops = match settings.ops.listen {
            Some(address) => listen_for_ops(address, settings.dev).await?,
            None => None,
        };
        let auth = Auth::new(
            store.clone(),
            keys,
            master_key,
            &settings.auth,
            &settings.password,
            &settings.throttle,
        )?
        .mailing(master_key, &settings.auth, &settings.mail);
        let threads = config::or_cores(settings.server.threads);
        let usage = Usage::new(
            store.clone(),
            tiers,
            &settings.usage,
            &settings.quota,
            HandleKey::new(&master_key.secret("reservation/v1")),
            threads,
        )?;
        match usage.missing_tiers().await {
            Ok(missing) if missing.is_empty() => {}
            Ok(missing) => error!(
                tiers = missing.join(", "),
                "users are in tiers that are not configured: they have the limits of the default one"
            ),
            Err(error) => warn!(
                error = error.with_causes(),
                "the tiers of users could not be looked at"
            ),
        }
        let upkeep = Upkeep::new(
            store.clone(),
            usage.clone(),
            Retention {
                usage_months: settings.usage.retention_months,
                audit_months: settings.audit.retention_months,
            },
        );
        let delivery = Delivery::new(store.clone(), webhook);
        let mailing = Mailing::new(store.clone(), auth.clone(), mailer);
        Ok(Self {
            settings: settings.server.clone(),
            gateway: settings.gateway.clone(),
            tls,
            listener,
            ops,
            rules,
            auth,
            usage,
            upkeep,
            delivery,
            mailing,
            store,
        })
    }

    /// The address that it listens on.
    ///
    /// # Errors
    /// When the socket has none.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The address of the operations port, if there is one.
    pub fn ops_addr(&self) -> Option<SocketAddr> {
        self.ops.as_ref()?.local_addr().ok()
    }

    /// Its TLS, if it speaks it.
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    pub fn auth(&self) -> &Auth {
        &self.auth
    }

    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Serves until `shutdown`, then drains: not serving, wait, stop accepting, finish what is in
    /// flight, close; within the configured deadlines.
    ///
    /// # Errors
    /// When the threads cannot be started, or when one of them ends while it should serve.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServerError> {
        let Self {
            settings,
            gateway,
            tls,
            listener,
            ops,
            rules,
            auth,
            usage,
            upkeep,
            delivery,
            mailing,
            store,
        } = self;
        let reporter = HealthReporter::new();
        let (readiness, readiness_known) = watch::channel(Readiness::Starting);
        health::report(&reporter, &readiness, Readiness::Starting).await;
        let afterwards = Afterwards::default();
        let routes = grpc::routes(
            auth.clone(),
            usage.clone(),
            HealthService::from_health_reporter(reporter.clone()),
            settings.reflection,
            settings.max_request_bytes,
            afterwards.clone(),
        )?;
        if gateway.trust_loopback {
            warn!("every program on this machine may ask as a gateway (gateway.trust_loopback)");
        }
        let (cut, cut_asked) = watch::channel(false);
        let metrics = CallMetrics::new(&rules);
        let serve = {
            let (settings, metrics) = (settings.clone(), metrics.clone());
            let end = CallEnd::new(settings.max_deadline, cut_asked);
            let memory = MemoryLayer::new(
                auth.clone(),
                usage.clone(),
                &rules,
                &metrics,
                settings.max_request_bytes,
                end.clone(),
            );
            let proxies = TrustedProxies::new(&settings.trusted_proxies.0);
            let access =
                AccessLayer::new(auth.clone(), rules).trusting_loopback(gateway.trust_loopback);
            let call = CallLayer::new(metrics, proxies, end);
            let service = call.layer(access.layer(routes.prepare()));
            move |incoming: Incoming, stop: watch::Receiver<bool>| {
                let (afterwards, service) = (afterwards.clone(), service.clone());
                let memory = memory.clone();
                let service_of = move |peer| memory.of(peer).layer(service.clone());
                async move {
                    serve(incoming, settings.max_streams, stop, service_of).await;
                    // It runs on the threads that serve, and ends with them.
                    afterwards.finished().await;
                }
            }
        };
        let threads = config::or_cores(settings.threads);
        let mut workers = Workers::start(threads, settings.max_connections, tls.as_ref(), serve)
            .map_err(ServerError::Threads)?;

        // Watches to the very end.
        let mut watching = JoinSet::new();
        if let Some(listener) = ops {
            let mut registry = Registry::with_prefix("tollkeeper");
            metrics.register(&mut registry);
            registry.register_collector(Box::new(ops::Rooms {
                auth: auth.clone(),
                usage: usage.clone(),
                store: store.clone(),
                upkeep: upkeep.status(),
                delivery: delivery.status(),
                mails: mailing.status(),
                connections: workers.loads(),
            }));
            let readiness = readiness_known;
            let served = ops::Ops {
                registry,
                readiness,
            };
            watching.spawn(ops::serve(listener, served));
        }

        let mut health = JoinSet::new();
        let (pinged, asked) = (store.clone(), auth.clone());
        health.spawn(health::follow(
            async move || pinged.ping().await,
            move || asked.freshness().trust(BootTime::now()),
            reporter.clone(),
            readiness.clone(),
        ));
        let mut background = JoinSet::new();
        background.spawn(upkeep.run());
        background.spawn(delivery.run());
        let last_mails = mailing.last();
        background.spawn(mailing.run());
        background.spawn(tasks::change_feed(
            store.clone(),
            auth.clone(),
            usage.clone(),
        ));
        background.spawn(usage.clone().keep());
        background.spawn(usage.clone().notice());
        background.spawn(tasks::api_key_uses(auth.clone()));

        if timeout(FIRST_WORDS, usage.ready()).await.is_err() {
            warn!("the database does not answer: no quota can be held yet");
        }
        let mut fault = tokio::select! {
            gone = workers.accept(&listener) => gone.err().map(ServerError::from),
            // Tasks run until they are dropped: one that ends has panicked.
            Some(ended) = health.join_next() => Some(ServerError::Task(ended.err())),
            Some(ended) = background.join_next() => Some(ServerError::Task(ended.err())),
            () = shutdown => None,
        };
        if let Some(fault) = &fault {
            error!(%fault, "cannot go on");
        }
        info!("shutting down");
        health.shutdown().await;
        health::report(&reporter, &readiness, Readiness::Draining).await;
        // Load balancers may send more until they have noticed.
        tokio::select! {
            gone = workers.accept(&listener) => fault = fault.or(gone.err().map(ServerError::from)),
            () = sleep(settings.drain_delay) => {}
        }
        drop(listener);
        health::end_watches(reporter).await;
        auth.end_watches();
        usage.end_streams();
        let until = Instant::now() + settings.drain_deadline;
        if !workers.drain(settings.drain_deadline).await {
            warn!("calls were still in flight at the deadline");
            cut.send_replace(true);
            workers.drain(LAST_WORDS).await;
        }
        let mut patience = LAST_WORDS;
        if usage.accepted_commits() > 0 {
            // Nowhere else are they: the database may be back in time.
            patience = patience.max(until.saturating_duration_since(Instant::now()));
        }
        let closed = timeout(patience, usage.close());
        let (closed, ()) = tokio::join!(closed, usage.give_back());
        if closed.is_err() {
            warn!("usage that was not acknowledged was given up");
        }
        // Only now: calls in flight still depend on the change feed.
        background.shutdown().await;
        let patience = until.saturating_duration_since(Instant::now());
        if timeout(patience.max(LAST_WORDS), last_mails.sent())
            .await
            .is_err()
        {
            warn!("mails were still being sent at the deadline: some may go twice");
        }
        usage.last_notices().await;
        tasks::last_api_key_uses(&auth).await;
        store.close();
        // Waited for: whoever comes next may want the port.
        watching.shutdown().await;
        info!("stopped");
        fault.map_or(Ok(()), Err)
    }
}

/// Listens for those who watch. In dev mode a second service on the machine does without.
async fn listen_for_ops(
    address: SocketAddr,
    dev: bool,
) -> Result<Option<TcpListener>, ServerError> {
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if dev => {
            warn!(%address, %error, "no metrics and probes (setting ops.listen)");
            Ok(None)
        }
        Err(source) => Err(ServerError::ListenForOps { address, source }),
    }
}

/// Brings the schema up to date; of many replicas starting together, one does it.
async fn migrate(url: &str) -> Result<(), Error> {
    let applied = Migrator::connect(url).await?.up()?;
    for name in &applied {
        info!(name, "applied migration");
    }
    Ok(())
}
