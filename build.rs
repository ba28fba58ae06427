//! Compiles `proto/`, and the protocols of others in `third_party/proto/`, into Rust and writes the
//! descriptor set.
//!
//! protox is a compiler for protobuf in Rust, so no `protoc` has to be installed. The set keeps
//! extension options: the access rules are read from it at start.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;
use tonic_prost_build::FileDescriptorSet;

/// A message that is written by hand, in `src/proto.rs`.
const TEXTS: &str = ".tollkeeper.Texts";

const PROTOS: [&str; 8] = [
    "tollkeeper/access/v1/access.proto",
    "tollkeeper/error/v1/error_reason.proto",
    "tollkeeper/auth/v1/auth_service.proto",
    "tollkeeper/usage/v1/usage_service.proto",
    "tollkeeper/admin/v1/admin_service.proto",
    "envoy/service/auth/v3/external_auth.proto",
    "envoy/service/ratelimit/v3/rls.proto",
    // Nothing imports it: what errors carry, for those that turn them into JSON.
    "google/rpc/error_details.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=third_party/proto");
    // `embed_migrations!` does not see new files by itself.
    println!("cargo:rerun-if-changed=migrations");

    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let mut compiler = protox::Compiler::new(["proto", "third_party/proto"])?;
    compiler
        .include_imports(true)
        .include_source_info(true)
        .open_files(PROTOS)?;
    let descriptor_set = compiler.encode_file_descriptor_set();
    fs::write(out_dir.join("descriptor_set.bin"), &descriptor_set)?;

    tonic_prost_build::configure()
        .build_transport(true)
        // The one that errors are made of.
        .extern_path(".google.rpc", "::tonic_types::pb")
        // How others map RPCs to HTTP; nothing here reads it.
        .extern_path(".google.api", "()")
        .extern_path(TEXTS, "crate::proto::Texts")
        .compile_fds(with_lists(prost_types_of(&descriptor_set)?))?;
    Ok(())
}

/// Has [`TEXTS`] stand for the maps in what gateways are answered. The bytes are the same, and so is the
/// descriptor set that others read.
fn with_lists(mut set: FileDescriptorSet) -> FileDescriptorSet {
    let files = set.file.iter_mut();
    for file in files.filter(|file| file.package().starts_with("envoy.")) {
        for message in &mut file.message_type {
            for field in &mut message.field {
                if field.type_name() == ".google.protobuf.Struct" {
                    field.type_name = Some(TEXTS.to_owned());
                }
            }
        }
    }
    set
}

/// Decodes the set for the generator, which knows no extensions.
fn prost_types_of(descriptor_set: &[u8]) -> Result<FileDescriptorSet, Box<dyn Error>> {
    Ok(FileDescriptorSet::decode(descriptor_set)?)
}
