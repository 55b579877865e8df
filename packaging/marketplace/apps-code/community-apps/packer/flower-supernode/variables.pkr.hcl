# What build.sh of one-apps gives.
variable "appliance_name" { type = string }
variable "distro" {
  type    = string
  default = ""
}
variable "version" { type = string }
variable "input_dir" { type = string }
variable "output_dir" { type = string }
variable "headless" { type = bool }
variable "arch" { type = string }

# What the builder gives, as PKR_VAR_supernode_agent_url and so on.
variable "supernode_agent_url" {
  type        = string
  description = "the package of supernode-agent, https:// or file://"
}

variable "supernode_agent_sha256" {
  type        = string
  description = "its sha256"
}

variable "flower_version" {
  type    = string
  default = "1.31.0"
}

variable "nvidia" {
  type        = string
  default     = "NO"
  description = "YES: NVIDIA's driver and container toolkit as well"
}
