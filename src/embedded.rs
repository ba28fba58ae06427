//! The private Postgres of a start without configuration.
//!
//! Makes a cluster in the data folder on first use, runs it on a Unix socket
//! that only its own account (and root) can enter, and stops it when the
//! service ends, however the service ends. It knows programs, folders, accounts
//! and signals; it must not know the schema, the settings or any SQL beyond the
//! one statement that creates the empty database.

mod cluster;
mod folders;
mod programs;

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::{fs::OpenOptionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::Child,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use tokio::sync::oneshot;

use cluster::stop_server;
pub use cluster::{Cluster, Lifetime};
use folders::{PostmasterStatus, SOCKET_PATH_MAX_BYTES, data_folder, socket_name, url};
use programs::OLDEST_MAJOR;

/// Superuser and database of the cluster.
const NAME: &str = "tollkeeper";

/// What to run, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder that holds the cluster, its socket, its log and the lock; made when missing.
    pub data_dir: PathBuf,
    /// Further Postgres settings, as in `-c name=value`.
    pub settings: Vec<(String, String)>,
}

/// A running private Postgres.
///
/// Dropping it stops Postgres too, but without waiting for the end.
#[derive(Debug)]
pub struct Embedded {
    database_url: String,
    stop: mpsc::Sender<oneshot::Sender<Result<(), EmbeddedError>>>,
}

/// Why the private Postgres could not be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    #[error(
        "no postgres {OLDEST_MAJOR} or later (with initdb beside it) found on this machine: \
         install postgresql (Debian: apt-get install postgresql) or set DATABASE_URL"
    )]
    NoPrograms,
    #[error(
        "the cluster in the data folder needs postgres {major}, which was not found: \
         install it (Debian: apt-get install postgresql-{major}) or set DATABASE_URL"
    )]
    NoProgramsOf { major: u32 },
    #[error(
        "postgres does not run as root, and there is neither a user postgres nor a user nobody: \
         start as an ordinary user or set DATABASE_URL"
    )]
    NoAccount,
    #[error(
        "the user postgres runs as (uid {uid}) cannot enter {}, on the way to the data folder: \
         run chmod o+x on it, choose another data folder or set DATABASE_URL", blocked.display()
    )]
    NotTraversable { blocked: PathBuf, uid: u32 },
    #[error(
        "another tollkeeper is using the data folder {}: stop it or choose another data folder",
        .0.display()
    )]
    Locked(PathBuf),
    #[error(
        "the socket path {} is longer than {SOCKET_PATH_MAX_BYTES} bytes: \
         choose a shorter data folder or a shorter TMPDIR", .0.display()
    )]
    SocketPathTooLong(PathBuf),
    #[error(
        "the folder {} belongs to another user or is open to others: remove it", .0.display()
    )]
    FolderNotOurs(PathBuf),
    #[error("postgres (process {pid}) of a killed tollkeeper still uses the data folder: stop it")]
    Orphan { pid: i32 },
    #[error("{program} failed ({outcome}); the end of {}:\n{tail}", log.display())]
    Failed {
        program: &'static str,
        outcome: String,
        log: PathBuf,
        tail: String,
    },
    #[error("postgres (process {pid}) did not stop, not even on SIGQUIT")]
    NotStopped { pid: i32 },
    #[error("the thread that looks after postgres ended early")]
    Abandoned,
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
}

impl Embedded {
    /// Starts the private Postgres in `options.data_dir`, making the cluster first when missing.
    ///
    /// Returns once it accepts connections. The server of a service that was
    /// killed is stopped first: whoever holds the lock owns the folder.
    ///
    /// Cancel-safe: when the future is dropped, whatever had started is stopped
    /// again in the background.
    ///
    /// # Errors
    /// Any [`EmbeddedError`]; each message says what to do about it.
    pub async fn start(options: Options) -> Result<Self, EmbeddedError> {
        let (ready, outcome) = oneshot::channel();
        let path = options.data_dir.clone();
        // The parent-death signal fires when the *thread* that spawned the
        // child ends, so Postgres needs a thread that lives as long as it
        // does; the runtime's own threads may not.
        thread::Builder::new()
            .name("private-postgres".to_owned())
            .spawn(move || look_after(&options, ready))
            .map_err(io_error("start a thread for postgres in", path))?;
        outcome.await.unwrap_or(Err(EmbeddedError::Abandoned))
    }

    /// URL of the empty database, for libpq and tokio-postgres alike.
    pub fn database_url(&self) -> &str {
        &self.database_url
    }

    /// Stops Postgres: open transactions are rolled back and the data is flushed.
    ///
    /// After 10 s without effect it asks for an immediate stop, from which the
    /// next start recovers. Once this returns `Ok` the folder is free again.
    ///
    /// Cancel-safe: once polled, the stop goes on without its caller.
    ///
    /// # Errors
    /// `NotStopped` · `Abandoned`
    pub async fn stop(self) -> Result<(), EmbeddedError> {
        let (done, outcome) = oneshot::channel();
        self.stop.send(done).map_err(|_| EmbeddedError::Abandoned)?;
        outcome.await.unwrap_or(Err(EmbeddedError::Abandoned))
    }
}

/// Tells the URL of the private Postgres that another process runs in `data_dir`.
///
/// `None` when there is none, when it is not ready, when it does not answer
/// within a second, or when the caller may not look into the folder. Blocks.
pub fn running_url(data_dir: &Path) -> Option<String> {
    let status = PostmasterStatus::read(&data_dir.join("postgres"))?;
    if !status.ready {
        return None;
    }
    let socket = status.socket_dir.join(socket_name());
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    // SSLRequest, the cheapest question of the protocol: the answer is one byte.
    stream.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).ok()?;
    stream.read_exact(&mut [0]).ok()?;
    Some(url(&status.socket_dir, NAME))
}

/// Whether a private Postgres has been made in `data_dir`.
pub fn has_cluster(data_dir: &Path) -> bool {
    data_dir.join("postgres").exists()
}

/// Owns Postgres from its start to its end, on a thread of its own.
fn look_after(options: &Options, ready: oneshot::Sender<Result<Embedded, EmbeddedError>>) {
    let (stop, stop_asked) = mpsc::channel();
    let started = lock(&options.data_dir).and_then(|lock| {
        let cluster = Cluster::prepare(options)?;
        let child = cluster.start(Lifetime::Thread)?;
        Ok((lock, cluster.database_url(NAME), child))
    });
    let (lock, database_url, mut child) = match started {
        Ok(started) => started,
        Err(error) => return drop(ready.send(Err(error))),
    };
    // An `Embedded` that nobody takes is dropped here, and its `stop` with it,
    // which ends the wait below at once.
    drop(ready.send(Ok(Embedded { database_url, stop })));
    let done = wait_for_stop(&stop_asked, &mut child);
    let outcome = stop_server(&mut child);
    drop(lock);
    if let Some(done) = done {
        drop(done.send(outcome));
    } else if let Err(error) = outcome {
        tracing::error!(%error, "the private Postgres was left running");
    }
}

/// Blocks until a stop is asked for, or the handle is dropped; reports an unexpected end.
fn wait_for_stop<T>(stop_asked: &mpsc::Receiver<T>, child: &mut Child) -> Option<T> {
    loop {
        match stop_asked.recv_timeout(Duration::from_secs(1)) {
            Ok(done) => return Some(done),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => {
                if let Ok(Some(status)) = child.try_wait() {
                    tracing::error!(
                        %status,
                        "the private Postgres ended by itself: postgres.log in the data folder says \
                         why; start the service again"
                    );
                    return stop_asked.recv().ok();
                }
            }
        }
    }
}

/// Takes the folder for this process, for as long as the returned file is open.
fn lock(data_dir: &Path) -> Result<File, EmbeddedError> {
    let path = data_folder(data_dir)?.join("tollkeeper.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(EmbeddedError::Locked(data_dir.to_owned())),
        Err(TryLockError::Error(cause)) => Err(io_error("lock", path)(cause)),
    }
}

fn io_error(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> EmbeddedError {
    let path = path.into();
    move |cause| EmbeddedError::Io {
        action,
        path,
        cause,
    }
}
