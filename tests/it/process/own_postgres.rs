use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::sleep;
use tollkeeper::embedded::{Embedded, Options};

/// A Postgres of the test's own, with the durability of production.
pub(super) struct Postgres {
    pub(super) running: Embedded,
    pub(super) data_dir: PathBuf,
}

impl Postgres {
    pub(super) async fn start(data_dir: PathBuf) -> Self {
        let options = Options {
            data_dir: data_dir.clone(),
            settings: Vec::new(),
        };
        let running = Embedded::start(options).await.unwrap();
        Self { running, data_dir }
    }

    /// Kills all its processes at once, the postmaster first: nobody is left to clean up.
    pub(super) async fn kill(self) -> PathBuf {
        let data_dir = fs::canonicalize(&self.data_dir).unwrap();
        let pid_file = fs::read_to_string(data_dir.join("postgres/postmaster.pid")).unwrap();
        let postmaster: i32 = pid_file.lines().next().unwrap().trim().parse().unwrap();
        let mut killed = processes_in(&data_dir);
        assert!(killed.contains(&postmaster), "{postmaster} of {killed:?}");
        killed.sort_by_key(|&pid| pid != postmaster);
        while !killed.is_empty() {
            for pid in killed {
                // An error means that it has just ended.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            sleep(Duration::from_millis(5)).await;
            killed = processes_in(&data_dir);
        }
        self.running.stop().await.unwrap();
        self.data_dir
    }
}

/// Living processes that work inside a folder, as those of a Postgres do.
pub(super) fn processes_in(folder: &Path) -> Vec<i32> {
    let processes = fs::read_dir("/proc").expect("Linux").flatten();
    processes
        .filter(|process| {
            fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder))
        })
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .collect()
}
