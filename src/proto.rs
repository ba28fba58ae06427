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

/// What gateways speak: `third_party/proto/README.md`.
pub mod envoy {
    pub mod config {
        pub mod core {
            pub mod v3 {
                tonic::include_proto!("envoy.config.core.v3");
            }
        }
    }
    pub mod extensions {
        pub mod common {
            pub mod ratelimit {
                pub mod v3 {
                    tonic::include_proto!("envoy.extensions.common.ratelimit.v3");
                }
            }
        }
    }
    pub mod service {
        pub mod auth {
            pub mod v3 {
                tonic::include_proto!("envoy.service.auth.v3");
            }
        }
        pub mod ratelimit {
            pub mod v3 {
                tonic::include_proto!("envoy.service.ratelimit.v3");
            }
        }
    }
    pub mod r#type {
        pub mod v3 {
            tonic::include_proto!("envoy.r#type.v3");
        }
    }
}

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
