//! Generated code and the descriptor set; nothing else.

#![allow(
    clippy::all,
    clippy::doc_markdown,
    missing_docs,
    unreachable_pub,
    rustdoc::all,
    reason = "generated"
)]

/// Every proto file of this service with its imports and their options, as compiled by `build.rs`.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor_set.bin"));

pub mod tollkeeper {
    pub mod access {
        pub mod v1 {
            tonic::include_proto!("tollkeeper.access.v1");
        }
    }
    pub mod admin {
        pub mod v1 {
            tonic::include_proto!("tollkeeper.admin.v1");
        }
    }
    pub mod auth {
        pub mod v1 {
            tonic::include_proto!("tollkeeper.auth.v1");
        }
    }
    pub mod error {
        pub mod v1 {
            tonic::include_proto!("tollkeeper.error.v1");
        }
    }
    pub mod usage {
        pub mod v1 {
            tonic::include_proto!("tollkeeper.usage.v1");
        }
    }
}
