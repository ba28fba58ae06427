//! A stand-in for the network between a server and Postgres, which a test can break.

use std::{
    future::pending,
    io,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::watch,
    task::JoinHandle,
};
use tokio_postgres::config::{Config, Host};
use tollkeeper::config::{Secret, Settings};

use super::TestApp;

/// Forwards connections to the Unix socket of a Postgres. Dropping it cuts them.
pub(crate) struct Proxy {
    link: watch::Sender<Link>,
    accepting: JoinHandle<()>,
    folder: tempfile::TempDir,
}

/// The application name of the change feed's connection.
const FEED: &[u8] = b"tollkeeper changes";

/// The state of the network.
#[derive(Clone, Copy)]
struct Link {
    mode: Mode,
    /// Nothing gets through the connections that carry the change feed.
    is_feed_silent: bool,
    /// How often all connections were cut: each ends at the first cut after its start.
    cuts: u64,
}

impl Link {
    fn lets_through(&self, is_feed: &AtomicBool) -> bool {
        let silent = self.is_feed_silent && is_feed.load(Ordering::Relaxed);
        self.mode == Mode::Open && !silent
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    /// Nothing gets through and nobody is told; later it does.
    Silent,
    /// What is sent now is lost with its connection, and nobody is ever told.
    Losing,
    /// New connections are closed at once.
    Refusing,
}

impl TestApp {
    /// Spawns a server that reaches its database through a proxy; the test itself goes past it.
    pub(crate) async fn spawn_behind_proxy(change: impl FnOnce(&mut Settings)) -> (Self, Proxy) {
        let mut proxied = None;
        let mut app = Self::spawn_with(|settings| {
            let direct = settings.database.url.expose().to_owned();
            let (proxy, url) = Proxy::start(&direct);
            settings.database.url = Secret::new(url);
            proxied = Some((proxy, direct));
            change(settings);
        })
        .await;
        let (proxy, direct) = proxied.expect("the settings were changed");
        app.database_url = direct;
        (app, proxy)
    }
}

impl Proxy {
    /// Starts a proxy before the server of `url`; returns the URL that leads through it.
    pub(crate) fn start(url: &str) -> (Self, String) {
        let config: Config = url.parse().expect("a URL of Postgres");
        let [Host::Unix(upstream)] = config.get_hosts() else {
            panic!("the tests' Postgres listens on a Unix socket");
        };
        let port = config.get_ports().first().copied().unwrap_or(5432);
        let name = format!(".s.PGSQL.{port}");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let listener = UnixListener::bind(folder.path().join(&name)).expect("a socket");
        let (link, _) = watch::channel(Link {
            mode: Mode::Open,
            is_feed_silent: false,
            cuts: 0,
        });
        let accepting = tokio::spawn(accept(listener, upstream.join(&name), link.clone()));
        let host = folder.path().to_str().expect("UTF-8").replace('/', "%2F");
        let user = config.get_user().expect("the URL names a user");
        let database = config.get_dbname().expect("the URL names a database");
        let through = format!("postgresql://{user}@{host}:{port}/{database}");
        let proxy = Self {
            link,
            accepting,
            folder,
        };
        (proxy, through)
    }

    /// Ends every connection and refuses new ones, like a server that went away.
    pub(crate) fn cut(&self) {
        self.link.send_modify(|link| {
            link.mode = Mode::Refusing;
            link.cuts += 1;
        });
    }

    /// Loses what is sent, and whatever comes after it on its connections, like a host that vanished.
    pub(crate) fn lose(&self) {
        self.link.send_modify(|link| link.mode = Mode::Losing);
    }

    /// Lets nothing through and tells nobody, like a network that swallows packets.
    pub(crate) fn pause(&self) {
        self.link.send_modify(|link| link.mode = Mode::Silent);
    }

    /// Swallows what the change feed says and hears, and nothing else.
    pub(crate) fn pause_feed(&self) {
        self.link.send_modify(|link| link.is_feed_silent = true);
    }

    pub(crate) fn resume(&self) {
        self.link.send_modify(|link| {
            link.mode = Mode::Open;
            link.is_feed_silent = false;
        });
    }

    /// The folder of the socket, which no client may be shown.
    pub(crate) fn folder(&self) -> &str {
        self.folder.path().to_str().expect("UTF-8")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn accept(listener: UnixListener, upstream: PathBuf, link: watch::Sender<Link>) {
    while let Ok((client, _)) = listener.accept().await {
        let state = *link.borrow();
        if state.mode != Mode::Refusing {
            tokio::spawn(forward(
                client,
                upstream.clone(),
                link.subscribe(),
                state.cuts,
            ));
        }
    }
}

async fn forward(
    client: UnixStream,
    upstream: PathBuf,
    mut link: watch::Receiver<Link>,
    cuts: u64,
) {
    let cut = link.clone();
    let both = async {
        let _ = link.wait_for(|link| link.mode == Mode::Open).await;
        let server = UnixStream::connect(upstream).await?;
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        let is_feed = AtomicBool::new(false);
        // Either side closing ends both, as between two processes.
        tokio::select! {
            ended = pump(from_client, to_server, link.clone(), &is_feed) => ended,
            ended = pump(from_server, to_client, link.clone(), &is_feed) => ended,
        }
    };
    let mut cut = cut;
    tokio::select! {
        _ = both => {}
        _ = cut.wait_for(|link| link.cuts != cuts) => {}
    }
}

async fn pump(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    mut link: watch::Receiver<Link>,
    is_feed: &AtomicBool,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        // A connection says in its first message what it is for.
        if buffer[..read].windows(FEED.len()).any(|name| name == FEED) {
            is_feed.store(true, Ordering::Relaxed);
        }
        if link.borrow().mode == Mode::Losing {
            pending::<()>().await;
        }
        let _ = link.wait_for(|link| link.lets_through(is_feed)).await;
        to.write_all(&buffer[..read]).await?;
    }
}
