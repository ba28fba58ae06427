//! The Postgres cluster of a test run: one for all tests, gone when the run is.
//!
//! Under `cargo test` all tests live in one process and share a static. Under
//! `cargo nextest` every test is a process: the first to come starts the
//! cluster, the others find it by the id of the run. No test can know that it
//! is the last one, so a small watcher outlives them, waits for the end of the
//! run, however it comes, and clears away.
//!
//! It knows databases and templates; it must not know our schema.

use std::{
    env,
    fs::{self, File, Permissions},
    os::unix::{
        fs::PermissionsExt as _,
        process::{CommandExt as _, parent_id},
    },
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio_postgres::{Client, NoTls};
use tollkeeper::embedded::{Cluster, Lifetime, Options, running_url};

/// Free memory that makes `/dev/shm` the better place; a run needs a fraction of it.
const ROOMY_BYTES: u64 = 1 << 30;

/// Nothing here has to survive a power cut. A test may hold a pool, and nextest
/// runs many tests at once.
const SETTINGS: [(&str, &str); 6] = [
    ("fsync", "off"),
    ("synchronous_commit", "off"),
    ("full_page_writes", "off"),
    ("max_connections", "400"),
    ("shared_buffers", "64MB"),
    // Whole statements are to be seen.
    ("track_activity_query_size", "16kB"),
];

/// Waits for process `$1` to end, then stops the server below folder `$2` and removes the folder.
///
/// A dead process that nobody has collected yet (state Z) counts as ended.
const WATCHER: &str = r#"
trap '' HUP INT TERM
alive() {
    kill -0 "$1" 2>/dev/null || return 1
    stat=; read -r stat 2>/dev/null </proc/"$1"/stat
    case $stat in *") Z "*) return 1 ;; esac
}
while alive "$1"; do sleep 0.5; done
tries=0
while [ -e "$2" ] && [ $tries -lt 100 ]; do
    server=; read -r server 2>/dev/null <"$2/data/postgres/postmaster.pid"
    if [ -n "$server" ] && alive "$server"; then kill -INT "$server"; else rm -rf "$2"; fi
    tries=$((tries + 1)); sleep 0.1
done
"#;

/// Superuser URL of the run's cluster for database `db`; starts the cluster on first use.
///
/// # Panics
/// When the cluster cannot be started, with the reason.
pub(crate) fn url(db: &str) -> String {
    format!("{}/{db}", run().server)
}

/// Fills the template database `name` by `make`, once per run, and closes it.
///
/// `make` gets the URL of the new, empty database and has to close its
/// connections: a database in use cannot be copied. Other tests wait
/// meanwhile. When `make` panics, the next caller starts afresh.
pub(crate) fn template_once(name: &str, make: impl FnOnce(&str)) {
    let root = &run().root;
    let _lock = lock(&root.join(format!("{name}.lock")));
    let done = root.join(format!("{name}.done"));
    if done.exists() {
        return;
    }
    execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"));
    execute(&format!("CREATE DATABASE {name}"));
    make(&url(name));
    execute(&format!(
        "ALTER DATABASE {name} WITH IS_TEMPLATE true ALLOW_CONNECTIONS false"
    ));
    File::create(done).expect("the folder of the run is writable");
}

/// Creates a database of its own for a test as a copy of `template`, and returns its URL.
pub(crate) fn create_from_template(template: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // The number of a process may come again within a long run, its time does not.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let micros = now.expect("it is past 1970").as_micros();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("{template}_{}_{count}_{micros:x}", process::id());
    // Copying files skips the write-ahead log, which without fsync is the faster way.
    execute(&format!(
        "CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy"
    ));
    url(&name)
}

/// An empty database for a test, and its URL.
pub(crate) async fn empty_database() -> String {
    tokio::task::spawn_blocking(|| create_from_template("template0"))
        .await
        .unwrap()
}

/// A connection of the test's own to the database that `url` names.
pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Drops the database that `url` names, whoever is still connected to it.
pub(crate) fn drop_database(url: &str) {
    let name = url.rsplit('/').next().unwrap_or_default();
    execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"));
}

/// The cluster this process shares with all tests of its run.
struct Run {
    root: PathBuf,
    /// URL up to the slash before the database.
    server: String,
}

fn run() -> &'static Run {
    static RUN: OnceLock<Run> = OnceLock::new();
    RUN.get_or_init(join_run)
}

/// Finds the run's cluster, or starts it when this is the first process to ask.
fn join_run() -> Run {
    let (key, runner) = match env::var("NEXTEST_RUN_ID") {
        Ok(id) => (id, parent_id()),
        Err(_) => (process::id().to_string(), process::id()),
    };
    let root = root_folder(&format!("tollkeeper-it-{key}"));
    fs::create_dir_all(&root).expect("a folder for the run can be made");
    // Started by root, the server runs under another account.
    let open = fs::set_permissions(&root, Permissions::from_mode(0o755));
    open.expect("the folder of the run is ours");
    let _lock = lock(&root.join("cluster.lock"));
    let data_dir = root.join("data");
    let url = running_url(&data_dir).unwrap_or_else(|| {
        // First, so that a run that ends during the start is cleared away too.
        watch(runner, &root);
        start(data_dir)
    });
    let (server, _) = url.rsplit_once('/').expect("the URL names a database");
    let server = server.to_owned();
    Run { root, server }
}

fn start(data_dir: PathBuf) -> String {
    let settings = SETTINGS.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let settings = settings.to_vec();
    Cluster::prepare(&Options { data_dir, settings })
        .and_then(|cluster| {
            cluster.start(Lifetime::Detached)?;
            Ok(cluster.database_url("postgres"))
        })
        .unwrap_or_else(|error| panic!("no Postgres for the tests: {error}"))
}

/// Leaves a process behind that clears `root` away once `runner` has ended.
fn watch(runner: u32, root: &Path) {
    let mut watcher = Command::new("sh");
    watcher.args(["-c", WATCHER, "sh", &runner.to_string()]);
    // In a group of its own, neither Ctrl-C nor nextest's own cleaning reaches it.
    watcher.arg(root).current_dir("/").process_group(0);
    watcher.stdin(Stdio::null()).stdout(Stdio::null());
    let watcher = watcher.stderr(Stdio::null()).spawn();
    drop(watcher.expect("sh can be started"));
}

/// Chooses the folder of the run: in memory where there is room, else in the temp folder.
fn root_folder(name: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let in_memory = memory.join(name);
    // The choice of the run's first process binds the others: room may shrink.
    let in_temp = env::temp_dir().join(name);
    let roomy = nix::sys::statvfs::statvfs(memory)
        .is_ok_and(|shm| shm.blocks_available() * shm.fragment_size() >= ROOMY_BYTES);
    let first = !in_temp.exists() && roomy && fs::create_dir_all(&in_memory).is_ok();
    if in_memory.exists() || first {
        in_memory
    } else {
        in_temp
    }
}

/// Waits for the lock, which other threads and processes share; held while the file is open.
fn lock(path: &Path) -> File {
    let file = File::create(path).expect("a lock file can be made");
    file.lock().expect("the lock file can be locked");
    file
}

/// Executes one statement as superuser, on a thread of its own: callers may be inside a runtime.
fn execute(statement: &str) {
    let url = url("postgres");
    let work = async {
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
        tokio::spawn(connection);
        client.batch_execute(statement).await
    };
    let on_thread = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be made")
            .block_on(work)
    };
    let outcome = thread::scope(|scope| scope.spawn(on_thread).join());
    if let Err(error) = outcome.expect("the statement's thread does not panic") {
        panic!("{statement}: {error:?}");
    }
}
