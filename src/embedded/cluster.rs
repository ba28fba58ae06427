//! A cluster on disk: making it, running its server, stopping it.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::Write as _,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    EmbeddedError, NAME, Options,
    folders::{
        Account, Log, PORT, PostmasterStatus, data_folder, private_folder, socket_folder, url,
    },
    io_error,
    programs::Programs,
};

const POLL: Duration = Duration::from_millis(10);
/// Time a start has to replay the log of a killed server; as `pg_ctl` waits.
const READY_DEADLINE: Duration = Duration::from_secs(60);
/// Time that what a killed service left running has to end.
const ORPHAN_DEADLINE: Duration = Duration::from_secs(10);
const DRAFT_DEADLINE: Duration = Duration::from_secs(1);
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Who ends a started server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// It stops when the thread that started it ends, where `setpriv` can arrange that.
    Thread,
    /// It runs until someone stops it.
    Detached,
}

/// A cluster on disk with all that is needed to run it. Everything here blocks.
#[derive(Debug)]
pub struct Cluster {
    folder: PathBuf,
    socket_dir: PathBuf,
    log: Log,
    programs: Programs,
    account: Option<Account>,
    /// Whether `setpriv` can start programs; the one of `BusyBox` cannot.
    setpriv: bool,
    settings: Vec<(String, String)>,
}

impl Cluster {
    /// Finds the cluster in `options.data_dir`, or makes it there.
    ///
    /// The caller makes sure that no other process does so at the same time.
    /// A process that dies here leaves nothing that the next one would take
    /// for a cluster.
    ///
    /// # Errors
    /// Any [`EmbeddedError`] but `Locked`, `Orphan` and `NotStopped`.
    pub fn prepare(options: &Options) -> Result<Self, EmbeddedError> {
        let data_dir = data_folder(&options.data_dir)?;
        let folder = data_dir.join("postgres");
        let programs = Programs::find_for(&folder)?;
        let account = Account::choose(&folder)?;
        let cluster = Self {
            socket_dir: socket_folder(&data_dir, account)?,
            log: Log::open(data_dir.join("postgres.log"))?,
            setpriv: setpriv_works(),
            settings: options.settings.clone(),
            folder,
            programs,
            account,
        };
        cluster.check_traversable(&data_dir)?;
        if !cluster.folder.exists() {
            let draft = data_dir.join("postgres.init");
            let contested = draft.exists();
            let made = cluster.make(&draft);
            // The programs of a killed first start may clear the folder away under ours as they
            // end; they do so once.
            if contested && made.is_err() {
                thread::sleep(DRAFT_DEADLINE);
                cluster.make(&draft)?;
            } else {
                made?;
            }
        }
        Ok(cluster)
    }

    /// Starts the server and waits until it accepts connections.
    ///
    /// A server that still runs in this cluster is taken for the orphan of a
    /// killed service and stopped first, which may take up to 10 s.
    ///
    /// # Errors
    /// `Orphan` · `Failed` · `NotStopped` · `Io`
    pub fn start(&self, lifetime: Lifetime) -> Result<Child, EmbeddedError> {
        let deadline = Instant::now() + ORPHAN_DEADLINE;
        loop {
            self.stop_orphan(deadline)?;
            let log_start = self.log.len();
            let mut child = self.spawn_server(lifetime)?;
            let error = match self.wait_until_ready(&mut child, log_start) {
                Ok(()) => return Ok(child),
                Err(error) => error,
            };
            // An orphan may have been too young for a pid file, and its
            // children may outlive it by a moment.
            let in_use = self.log.tail(log_start);
            let in_use = in_use.contains("\"postmaster.pid\" already exists")
                || in_use.contains("shared memory block");
            if !in_use || Instant::now() > deadline {
                return Err(error);
            }
            thread::sleep(POLL * 10);
        }
    }

    /// URL of database `name` of this cluster, for its superuser.
    pub fn database_url(&self, name: &str) -> String {
        url(&self.socket_dir, name)
    }

    /// Makes the cluster in `draft` and renames it into place when it is complete.
    fn make(&self, draft: &Path) -> Result<(), EmbeddedError> {
        // The programs of a killed first start may be ending just now. Robbed
        // of its folder, the backend would crash and leave shared memory behind.
        let now = Instant::now();
        wait_until(now + DRAFT_DEADLINE, || {
            !draft.join("postmaster.pid").exists()
        });
        wait_until(now + 2 * DRAFT_DEADLINE, || {
            !draft.exists() || fs::remove_dir_all(draft).is_ok()
        });
        private_folder(draft, self.account)?;
        // Other C libraries than glibc and musl may lack C.UTF-8. "C" sorts the
        // same way, but folds the case of ASCII letters only.
        if self.initdb(draft, "C.UTF-8").is_err() {
            self.initdb(draft, "C")?;
        }
        let mut create = self.command("postgres", Some(Signal::SIGTERM));
        create.args(["--single", "-F", "-c", "exit_on_error=true", "-D"]);
        create.arg(draft).arg("postgres");
        self.run("postgres", create, &format!("CREATE DATABASE {NAME}\n"))?;
        fs::rename(draft, &self.folder).map_err(io_error("rename", draft))
    }

    fn initdb(&self, draft: &Path, locale: &str) -> Result<(), EmbeddedError> {
        let mut initdb = self.command("initdb", Some(Signal::SIGTERM));
        // Without a sync a power cut in the first seconds can cost the new,
        // still empty cluster; with it every first start takes far longer.
        initdb.args(["--no-sync", "--no-instructions", "--encoding=UTF8"]);
        // Trust is safe here: only the account itself and root can enter the
        // folder of the only socket.
        initdb.args(["--auth-local=trust", "--auth-host=reject"]);
        initdb.args(["--username", NAME, "--locale", locale, "--pgdata"]);
        initdb.arg(draft);
        self.run("initdb", initdb, "")
    }

    fn spawn_server(&self, lifetime: Lifetime) -> Result<Child, EmbeddedError> {
        let signal = (lifetime == Lifetime::Thread).then_some(Signal::SIGINT);
        let mut server = self.command("postgres", signal);
        server.arg("-D").arg(&self.folder);
        // Quoted, because commas separate in this setting.
        let socket_dir = self.socket_dir.to_string_lossy().replace('"', "\"\"");
        let private = [
            ("listen_addresses", ""),
            ("unix_socket_directories", &format!("\"{socket_dir}\"")),
            ("unix_socket_permissions", "0700"),
            ("port", &PORT.to_string()),
            ("logging_collector", "off"),
        ];
        // Last, so that no other setting can open it up.
        let others = self.settings.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        for (name, value) in others.chain(private) {
            server.arg("-c").arg(format!("{name}={value}"));
        }
        let (log, errors) = (self.log.writer()?, self.log.writer()?);
        server.stdin(Stdio::null()).stdout(log).stderr(errors);
        server
            .spawn()
            .map_err(io_error("run", self.programs.path("postgres")))
    }

    fn wait_until_ready(&self, child: &mut Child, log_start: u64) -> Result<(), EmbeddedError> {
        let deadline = Instant::now() + READY_DEADLINE;
        let pid = pid_of(child);
        while Instant::now() < deadline {
            if let Some(status) = PostmasterStatus::read(&self.folder)
                && status.pid == pid
                && status.ready
            {
                return Ok(());
            }
            if let Ok(Some(status)) = child.try_wait() {
                return Err(self.failed("postgres", &status.to_string(), log_start));
            }
            thread::sleep(POLL);
        }
        stop_server(child)?;
        Err(self.failed("postgres", "not ready in time", log_start))
    }

    /// Stops a server that a killed service has left in this cluster, by `deadline`.
    ///
    /// The kernel has told it to stop already, but that signal is lost on a
    /// server too young to listen, and never sent where `setpriv` is missing.
    fn stop_orphan(&self, deadline: Instant) -> Result<(), EmbeddedError> {
        let mut last = None;
        let gone = wait_until(deadline, || {
            let orphan = self.orphan();
            if let Some(pid) = orphan {
                // Repeats change nothing. A failure means that it has just gone.
                let _ = kill(Pid::from_raw(pid), Signal::SIGINT);
                last = orphan;
            }
            orphan.is_none()
        });
        match last {
            Some(pid) if !gone => Err(EmbeddedError::Orphan { pid }),
            Some(pid) => {
                tracing::info!(pid, "stopped the Postgres of a killed service");
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Pid of the server that still runs in this cluster.
    ///
    /// Removes a pid file whose number has passed to another process (as after
    /// the restart of a container), because Postgres would refuse to start.
    fn orphan(&self) -> Option<i32> {
        let pid = PostmasterStatus::read(&self.folder)?.pid;
        // A server works inside its cluster. Compared by inode: a path may
        // have another name where it is mounted twice.
        let cwd = fs::metadata(format!("/proc/{pid}/cwd")).ok()?;
        let cluster = fs::metadata(&self.folder).ok()?;
        if (cwd.dev(), cwd.ino()) == (cluster.dev(), cluster.ino()) {
            return Some(pid);
        }
        let _ = fs::remove_file(self.folder.join("postmaster.pid"));
        None
    }

    /// Checks that the account can enter every folder down to `data_dir`.
    ///
    /// Asks the kernel from a process of that account: mode bits alone do not
    /// tell, as there are access lists.
    fn check_traversable(&self, data_dir: &Path) -> Result<(), EmbeddedError> {
        let Some(account) = self.account else {
            return Ok(());
        };
        let mut folders: Vec<&Path> = data_dir.ancestors().collect();
        folders.reverse();
        let mut check = self.wrap(OsStr::new("/bin/sh"), None);
        check.args(["-c", "for d; do test -x \"$d\" || exit 1; echo; done", "sh"]);
        let output = check
            .args(&folders)
            .output()
            .map_err(io_error("check the way to", data_dir))?;
        match folders.get(output.stdout.len()) {
            Some(blocked) => Err(EmbeddedError::NotTraversable {
                blocked: blocked.to_path_buf(),
                uid: account.uid,
            }),
            None => Ok(()),
        }
    }

    fn command(&self, program: &'static str, on_thread_end: Option<Signal>) -> Command {
        self.wrap(self.programs.path(program).as_os_str(), on_thread_end)
    }

    /// Command that runs `program` under the account, with a signal for when this thread ends.
    fn wrap(&self, program: &OsStr, on_thread_end: Option<Signal>) -> Command {
        let mut command = if self.setpriv && (on_thread_end.is_some() || self.account.is_some()) {
            let mut command = Command::new("setpriv");
            if let Some(signal) = on_thread_end {
                command.args(["--pdeathsig", signal.as_str().trim_start_matches("SIG")]);
            }
            if let Some(Account { uid, gid }) = self.account {
                command.args([format!("--reuid={uid}"), format!("--regid={gid}")]);
                command.arg("--clear-groups");
            }
            command.arg("--").arg(program);
            command
        } else {
            let mut command = Command::new(program);
            if let Some(Account { uid, gid }) = self.account {
                command.uid(uid).gid(gid);
            }
            command
        };
        // PGPORT, PGDATA and the like are meant for someone else's server.
        for (name, _) in env::vars_os() {
            if name.as_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        // The account may not be able to enter our working folder. A group of
        // its own keeps a Ctrl-C away: the service stops Postgres in order.
        command.current_dir("/").process_group(0);
        command
    }

    /// Runs a command to its end, with its output in the log.
    fn run(
        &self,
        program: &'static str,
        mut command: Command,
        input: &str,
    ) -> Result<(), EmbeddedError> {
        let log_start = self.log.len();
        let (log, errors) = (self.log.writer()?, self.log.writer()?);
        command.stdin(Stdio::piped()).stdout(log).stderr(errors);
        let failed = || io_error("run", self.programs.path(program));
        let mut child = command.spawn().map_err(failed())?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that ended before reading says why in its status.
            let _ = stdin.write_all(input.as_bytes());
        }
        let status = child.wait().map_err(failed())?;
        if status.success() {
            Ok(())
        } else {
            Err(self.failed(program, &status.to_string(), log_start))
        }
    }

    fn failed(&self, program: &'static str, outcome: &str, log_start: u64) -> EmbeddedError {
        EmbeddedError::Failed {
            program,
            outcome: outcome.to_owned(),
            log: self.log.path.clone(),
            tail: self.log.tail(log_start),
        }
    }
}

/// Stops the server: in order (`SIGINT`, "fast"), else at once (`SIGQUIT`, "immediate").
pub(super) fn stop_server(child: &mut Child) -> Result<(), EmbeddedError> {
    let pid = pid_of(child);
    for signal in [Signal::SIGINT, Signal::SIGQUIT] {
        // Not reaped before `try_wait` below, so the pid cannot be another's.
        if matches!(child.try_wait(), Ok(None)) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
        let deadline = Instant::now() + STOP_DEADLINE;
        if wait_until(deadline, || matches!(child.try_wait(), Ok(Some(_)))) {
            return Ok(());
        }
        tracing::warn!(pid, %signal, "the private Postgres does not stop");
    }
    Err(EmbeddedError::NotStopped { pid })
}

fn wait_until(deadline: Instant, mut done: impl FnMut() -> bool) -> bool {
    while !done() {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(POLL);
    }
    true
}

fn setpriv_works() -> bool {
    let mut probe = Command::new("setpriv");
    probe
        .args(["--pdeathsig", "INT", "true"])
        .stdin(Stdio::null());
    let status = probe.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn pid_of(child: &Child) -> i32 {
    child.id().cast_signed()
}
