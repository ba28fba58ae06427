use std::{
    env,
    fs::{self, File, Permissions},
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use super::{DEADLINE, Service};
use crate::harness::cluster;

/// 256 random bits, for tests only.
pub(super) const MASTER_KEY: &str =
    "5c1f0e9a7b3d2468ace013579bdf8642f7e6d5c4b3a291807f6e5d4c3b2a1908";

/// A folder for all that the processes of one test write. Removed with the test.
pub(super) struct Home {
    folder: tempfile::TempDir,
    database: Option<String>,
    /// Whether the database ends with this.
    owns_database: bool,
    started: AtomicU32,
}

/// How a command ended.
pub(super) struct Outcome {
    pub(super) code: Option<i32>,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Home {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        // Started by root, Postgres runs under another account, which has to get through.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("ours");
        Self {
            folder,
            database: None,
            owns_database: false,
            started: AtomicU32::new(0),
        }
    }

    /// With an empty database of its own on the cluster of the tests.
    pub(super) fn with_database() -> Self {
        let mut home = Self::new();
        home.database = Some(cluster::create_from_template("template0"));
        home.owns_database = true;
        home
    }

    /// With a database that somebody else looks after.
    pub(super) fn with_database_at(url: &str) -> Self {
        let mut home = Self::new();
        home.database = Some(url.to_owned());
        home
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(super) fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub(super) fn database_url(&self) -> &str {
        self.database
            .as_deref()
            .expect("made by Home::with_database")
    }

    /// The program with none of our settings but those of this home.
    pub(super) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tollkeeper"));
        for (name, _) in env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if name.starts_with("TOLLKEEPER_") || name == "DATABASE_URL" {
                command.env_remove(name);
            }
        }
        command
            .args(args)
            .current_dir(self.path())
            .env("TOLLKEEPER_DATA_DIR", self.data_dir())
            .env("TOLLKEEPER_SERVER_LISTEN", "127.0.0.1:0")
            .env("TOLLKEEPER_OPS_LISTEN", "127.0.0.1:0")
            .env("TOLLKEEPER_PASSWORD_ARGON2_MEMORY_KIB", "7168")
            .env("TOLLKEEPER_PASSWORD_ARGON2_ITERATIONS", "1");
        if let Some(url) = &self.database {
            command.env("DATABASE_URL", url);
        }
        command
    }

    /// The program with settings fit for production. Needs a database.
    pub(super) fn production(&self, args: &[&str]) -> Command {
        let keys = self.path().join("keys");
        if !keys.exists() {
            let made = self.run(&["keys", "generate", "--dir", keys.to_str().expect("UTF-8")]);
            assert_eq!(made.code, Some(0), "{}", made.stderr);
        }
        let mut command = self.command(args);
        command
            .env("DATABASE_URL", self.database_url())
            .env("TOLLKEEPER_AUTH_MASTER_KEY", MASTER_KEY)
            .env("TOLLKEEPER_AUTH_KEY_DIR", keys);
        command
    }

    /// Runs a command to its end.
    pub(super) fn run(&self, args: &[&str]) -> Outcome {
        self.finish(self.command(args), "")
    }

    /// Runs a command with this input to its end.
    pub(super) fn finish(&self, mut command: Command, input: &str) -> Outcome {
        command.stdin(Stdio::piped());
        let mut service = self.start(command);
        let mut stdin = service.child.stdin.take().expect("piped");
        // A program that ended without reading says why in its status.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let code = service.ended().code();
        Outcome {
            code,
            stdout: service.output(),
            stderr: service.log(),
        }
    }

    /// Starts `serve` without further settings.
    pub(super) fn serve(&self) -> Service {
        self.start(self.command(&["serve"]))
    }

    /// Starts a command with its output in files of this home.
    pub(super) fn start(&self, mut command: Command) -> Service {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let [stdout, stderr] =
            ["out", "log"].map(|kind| self.path().join(format!("{number}.{kind}")));
        command.stdout(File::create(&stdout).expect("a file"));
        command.stderr(File::create(&stderr).expect("a file"));
        let child = command.spawn().expect("the program starts");
        Service {
            child,
            stdout,
            stderr,
        }
    }

    /// The value of `name` in the file of the first run.
    pub(super) fn first_run(&self, name: &str) -> String {
        let path = self.data_dir().join("first-run.txt");
        let text = fs::read_to_string(path).expect("a file of credentials");
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        let (_, value) = pairs.find(|(key, _)| *key == name).expect(name);
        value.to_owned()
    }

    /// Whether a process works inside the data folder, as Postgres does.
    pub(super) fn has_postgres(&self) -> bool {
        let data_dir = self.data_dir();
        let processes = fs::read_dir("/proc").expect("Linux").flatten();
        processes
            .filter_map(|process| fs::read_link(process.path().join("cwd")).ok())
            .any(|folder| folder.starts_with(&data_dir))
    }

    /// Waits until Postgres has gone; the kernel tells it to when the service is killed.
    pub(super) fn postgres_gone(&self) -> bool {
        let deadline = Instant::now() + DEADLINE;
        while self.has_postgres() {
            if Instant::now() > deadline {
                return false;
            }
            sleep(Duration::from_millis(10));
        }
        true
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        match &self.database {
            Some(url) if self.owns_database => cluster::drop_database(url),
            Some(_) => {}
            None => drop(self.postgres_gone()),
        }
    }
}
