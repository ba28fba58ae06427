//! The composition root: builds every part, serves, drains. The only room that sees them all.

use std::{future::Future, io, net::SocketAddr, time::Duration};

use chrono::Utc;
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::transport::server::TcpIncoming;
use tonic_health::server::{HealthReporter, HealthService};
use tracing::{info, warn};

use crate::{
    auth::{Auth, KeyRing, MasterKey},
    config::{ServerSettings, Settings},
    error::Error,
    grpc::{self, AccessLayer, Bounds, CallLayer, Rules, RulesError, health},
    proto::DESCRIPTOR_SET,
    store::{Migrator, Store},
    tasks,
    usage::{TiersError, Usage, load_tiers},
};

/// How long the answers to calls that were cut may take to leave.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why a server did not start or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on {address}: {source}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error(transparent)]
    Tiers(#[from] TiersError),
    #[error(transparent)]
    Rules(#[from] RulesError),
    #[error("the descriptor set cannot be read: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("cannot migrate the database (setting database.url)")]
    Migrate(#[source] Error),
    #[error(transparent)]
    Service(#[from] Error),
    #[error("the listener failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// A server that is ready to serve: migrated, bound, not yet accepting.
pub struct Server {
    settings: ServerSettings,
    listener: TcpListener,
    rules: Rules,
    auth: Auth,
    usage: Usage,
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
        let address = settings.server.listen;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| ServerError::Listen { address, source })?;
        migrate(settings.database.url.expose())
            .await
            .map_err(ServerError::Migrate)?;
        let store = Store::new(&settings.database)?;
        tasks::make_partitions(&store, Utc::now()).await?;
        let auth = Auth::new(
            store.clone(),
            keys,
            master_key,
            &settings.auth,
            &settings.password,
        )?;
        let usage = Usage::new(store.clone(), tiers);
        Ok(Self {
            settings: settings.server.clone(),
            listener,
            rules,
            auth,
            usage,
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
    /// When the listener fails.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServerError> {
        let Self {
            settings,
            listener,
            rules,
            auth,
            usage,
            store,
        } = self;
        let reporter = HealthReporter::new();
        health::report(&reporter, false).await;
        let bounds = Bounds {
            max_request_bytes: settings.max_request_bytes,
            max_deadline: settings.max_deadline,
        };
        let routes = grpc::routes(
            auth.clone(),
            usage,
            HealthService::from_health_reporter(reporter.clone()),
            settings.reflection,
            bounds,
        )?;
        let (stop, stopped) = oneshot::channel::<()>();
        let (cut, cut_asked) = watch::channel(false);
        let serving = tonic::transport::Server::builder()
            .max_concurrent_streams(settings.max_streams)
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .layer(CallLayer::new(bounds.max_deadline, cut_asked))
            .layer(AccessLayer::new(auth, rules))
            .add_routes(routes)
            .serve_with_incoming_shutdown(
                TcpIncoming::from(listener).with_nodelay(Some(true)),
                async {
                    // An error means that this function is gone, and with it the server.
                    let _ = stopped.await;
                },
            );

        let mut background = JoinSet::new();
        let pinged = store.clone();
        background.spawn(health::follow(
            async move || pinged.ping().await,
            reporter.clone(),
        ));
        background.spawn(tasks::upkeep(store.clone()));

        let mut serving = tokio::spawn(serving);
        tokio::select! {
            ended = &mut serving => {
                // It never ends by itself but by a fault.
                return ended.map_err(Error::internal)?.map_err(Into::into);
            }
            () = shutdown => {}
        }
        info!("shutting down");
        background.shutdown().await;
        health::report(&reporter, false).await;
        sleep(settings.drain_delay).await;
        let _ = stop.send(());
        health::end_watches(reporter).await;
        let mut drained = timeout(settings.drain_deadline, &mut serving).await;
        if drained.is_err() {
            warn!("calls were still in flight at the deadline");
            // Connections are tasks of their own and outlive the listener: their calls are told.
            cut.send_replace(true);
            drained = timeout(LAST_WORDS, &mut serving).await;
        }
        if drained.is_err() {
            serving.abort();
        }
        store.close();
        info!("stopped");
        match drained {
            Ok(ended) => Ok(ended.map_err(Error::internal)??),
            Err(_) => Ok(()),
        }
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
