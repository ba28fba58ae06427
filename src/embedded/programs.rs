//! Finds an installation of Postgres on this machine.

use std::{
    env, fs, iter,
    path::{Path, PathBuf},
    process::Command,
};

use super::EmbeddedError;

pub(super) const OLDEST_MAJOR: u32 = 15;

/// Folder of a Postgres installation that can make and run a cluster.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    dir: PathBuf,
    major: u32,
}

impl Programs {
    /// Finds the programs that match the cluster, or for a new one the first that will do.
    pub(super) fn find_for(cluster: &Path) -> Result<Self, EmbeddedError> {
        let wanted = fs::read_to_string(cluster.join("PG_VERSION"))
            .ok()
            .and_then(|version| leading_number(&version));
        let fits = |found: &Self| wanted.map_or(found.major >= OLDEST_MAJOR, |w| found.major == w);
        program_folders()
            .filter_map(|dir| Self::in_folder(&dir))
            .find(fits)
            .ok_or(match wanted {
                None => EmbeddedError::NoPrograms,
                Some(major) => EmbeddedError::NoProgramsOf { major },
            })
    }

    fn in_folder(dir: &Path) -> Option<Self> {
        let postgres = fs::canonicalize(dir.join("postgres")).ok()?;
        // A link in a bin folder leads to where the rest of the programs are.
        let dir = [postgres.parent()?, dir]
            .into_iter()
            .find(|dir| dir.join("initdb").exists() && dir.join("postgres").exists())?;
        let version = Command::new(&postgres).arg("--version").output().ok()?;
        let version = String::from_utf8_lossy(&version.stdout).into_owned();
        Some(Self {
            major: leading_number(version.split_whitespace().nth(2)?)?,
            dir: dir.to_owned(),
        })
    }

    pub(super) fn path(&self, program: &str) -> PathBuf {
        self.dir.join(program)
    }
}

/// Lists the folders that may hold Postgres, the most telling first; lazy, as it runs `pg_config`.
fn program_folders() -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let path: Vec<PathBuf> = env::split_paths(&path)
        .filter(|dir| dir.is_absolute())
        .collect();
    let pg_config = iter::once_with(|| {
        let output = Command::new("pg_config").arg("--bindir").output().ok()?;
        let dir = String::from_utf8(output.stdout).ok()?;
        Some(PathBuf::from(dir.trim_end()))
    });
    // Debian, Red Hat (of postgresql.org), SUSE, Alpine, Homebrew, Postgres.app
    let usual = [
        ("/usr/lib/postgresql", "", "bin"),
        ("/usr", "pgsql-", "bin"),
        ("/usr/lib", "postgresql", "bin"),
        ("/usr/libexec", "postgresql", ""),
        ("/opt/homebrew/opt", "postgresql@", "bin"),
        ("/usr/local/opt", "postgresql@", "bin"),
        ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
    ];
    let usual = usual
        .into_iter()
        .flat_map(|(parent, prefix, bin)| versions_in(parent, prefix, bin));
    path.into_iter().chain(pg_config.flatten()).chain(usual)
}

/// Lists `parent/<prefix><version>/<bin>`, the highest version first.
fn versions_in(parent: &str, prefix: &str, bin: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut versions: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = leading_number(name.strip_prefix(prefix)?)?;
            Some((version, entry.path().join(bin)))
        })
        .collect();
    versions.sort_unstable_by(|a, b| b.cmp(a));
    versions.into_iter().map(|(_, dir)| dir).collect()
}

fn leading_number(text: &str) -> Option<u32> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text[..end].parse().ok()
}
